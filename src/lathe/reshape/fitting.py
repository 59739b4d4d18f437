"""The bench on which a narrow child is fitted to its parent: both models, the text, and what has been kept so far.

A fit is kept where it misses less of what it should give, on rows of the text that fit nothing; or, where the fits
are judged by predictions, where the child's come nearer to the parent's (`lathe.reshape.divergence`).

Where the states are streamed, so are both models: the layer that is worked on is read, and the text waits on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch, Ear
from lathe.reshape.divergence import Divergence
from lathe.reshape.regress import Gain, Linear, Pairs, best, fit_gain, gain_error
from lathe.reshape.state import ENDS, State, Step
from lathe.reshape.stream import StreamedTransformer, blank, held, model_of
from lathe.reshape.walk import Streams

_NOTHING = 1e-12  # a share missed, or a divergence, that is but rounding

Notes = Mapping[str, tuple[Tensor, Tensor]]
Wanted = Callable[[Notes, Notes], tuple[Tensor, Tensor, Tensor | None]]
Run = Callable[[Mapping[str, Ear], int, int], None]
Parts = Callable[[Transformer], Iterable[nn.Module]]


@dataclass(frozen=True)
class Site:
    """A part of both models that a fit looks at.

    Args:
        run: runs one batch through the parent's (0) or the child's (1), with ears on modules.
        rows: which rows of a batch count.
        parts: the modules that run.
    """

    run: Run
    rows: Callable[[int], Tensor]
    parts: Parts


class Both:
    """Pairs to fit on and pairs to choose by."""

    def __init__(self) -> None:
        self.fitted = Pairs()
        self.held = Pairs()


class Fitting:
    """A child beside its parent.

    Args:
        parent, cut: the states of the two.
        into: old × new: the parent's stream in the child's channels.
        fitted, held: the text to fit on, and to choose by.
        embed: the parent's embeddings in the child's channels, where their own width was cut.
        by_predictions: whether every fit is judged by the predictions.
    """

    def __init__(
        self,
        parent: State,
        cut: State,
        into: Tensor,
        fitted: Sequence[Batch],
        held: Sequence[Batch],
        embed: Tensor | None,
        by_predictions: bool,
    ) -> None:
        self.before, self.state, self.into = parent, cut, into
        self.embed, self.by_predictions = embed, by_predictions
        device = next(iter(fitted[0].values())).device
        wide = all(t.dtype == torch.float64 for t in parent.tensors.values())
        self.dtype = torch.float64 if wide else torch.float32
        self.parent, self.child = (model_of(state, self.dtype, device) for state in (parent, cut))
        self.batches = [*fitted, *held]
        self.n_fitted = len(fitted)
        self.divergence = Divergence(self.parent, held, into)
        self.now = self.start = self.divergence(self.child)
        self.detail: dict[str, float] = {}
        self.left: list[str] = []
        self.streams: tuple[Streams, Streams] = (Streams(blank(self.parent)), Streams(blank(self.child)))
        self.memories: tuple[Streams, Streams] | None = None  # what the encoders left, once they are fitted
        self.at = 0

    def result(self) -> tuple[State, list[Step]]:
        """The fitted state and the step that tells of it."""
        width = self.state.architecture.d_model
        exact = self.start < 1e-9 and self.now < 1e-9
        measures = f"share of the wanted outputs missed on text held out{ENDS}{self.divergence.measures}"
        note = ""
        if self.left:
            many = len(self.left) + len(self.detail)
            note = f"{len(self.left)} of {many} fits brought nothing on text held out and stayed as cut: "
            note += ", ".join(self.left)
        detail = {"before": self.start, **self.detail, "after": self.now}
        return self.state, [Step(f"refit at d_model {width}", exact, detail, measures, note)]

    def keep(self, label: str, tensors: Mapping[str, Tensor], missed: float, before: float) -> None:
        """Keep these tensors if they miss less of what they should give; or, so told, of the parent's predictions."""
        if self.by_predictions:
            is_kept = self.attempt(label, tensors, missed)
        elif is_kept := missed < before and before > _NOTHING:
            self._put(tensors)
            self.detail[label] = missed
        if not is_kept:
            self.left.append(label)

    def attempt(self, label: str, tensors: Mapping[str, Tensor], missed: float | None = None) -> bool:
        """Keep these tensors if the child's predictions come nearer to the parent's, and say whether they did."""
        old = self.state
        self._put(tensors)
        found = self.divergence(self.child)
        if found < self.now and self.now > _NOTHING:
            self.now = found
            self.detail[label] = found if missed is None else missed
            return True
        self._become(old, tensors)
        return False

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        self._become(self.state.with_(tensors), tensors)

    def _become(self, state: State, changed: Iterable[str]) -> None:
        """Another state, which differs in some tensors."""
        self.state = state
        if isinstance(self.child, StreamedTransformer):
            cast = state.cast(self.dtype).tensors
            for name in changed:
                self.child.tensors.take(name, cast, name)
            return
        for name in changed:
            parameter = self.child.get_parameter(name)
            parameter.data = state.tensors[name].detach().to(parameter.device, self.dtype).contiguous()

    def linear(self, name: str) -> Linear:
        """A linear layer of the child, in float64."""
        bias = f"{name}.bias"
        return Linear(self.state.wide(f"{name}.weight"), self.state.wide(bias) if bias in self.state.tensors else None)

    def parents(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the parent's linear layer, as they are stored."""
        bias = f"{name}.bias"
        has = bias in self.before.tensors
        return self.before.tensors[f"{name}.weight"].detach(), self.before.tensors[bias].detach() if has else None

    def keeping(self, parts: Parts) -> AbstractContextManager[object]:
        """Keep some modules of both models in memory over many calls."""
        stack = ExitStack()
        for model in (self.parent, self.child):
            stack.enter_context(held(model, parts(model)))
        return stack

    def fit_readers(self, label: str, names: Iterable[str], pairs: Both, onto: Tensor | None = None) -> None:
        """Readers of one input, fitted together; `onto`, new × old, where what they give is another basis too."""
        tensors = self.state.blank()
        misses: list[tuple[float, float]] = []
        for name in names:
            weight, bias = self.parents(name)
            if onto is not None:
                weight, bias = onto @ weight.cpu().double(), None if bias is None else onto @ bias.cpu().double()
            fitted, held = (each.through(weight, bias) for each in (pairs.fitted, pairs.held))
            chosen, before, after = best(self.linear(name), fitted, held)
            tensors |= linear_tensors(name, chosen)
            misses.append((after, before))
        after, before = (sum(each) / len(misses) for each in zip(*misses))
        self.keep(label, tensors, after, before)

    def gain(self, norm: str) -> Gain:
        """A norm of the child, in float64."""
        bias = f"{norm}.bias"
        return Gain(self.state.wide(f"{norm}.weight"), self.state.wide(bias) if bias in self.state.tensors else None)

    def gather(self, site: Site, read: Sequence[str], wanted: Wanted) -> Both:
        """Pairs over the text.

        Args:
            site: what runs.
            read: the modules whose inputs and outputs are looked at, in both models.
            wanted: from what was heard in the parent and in the child, what is read, what should be given, and the
                tokens' weights.
        """
        pairs = Both()
        with self.keeping(site.parts):
            for number in range(len(self.batches)):
                mask = site.rows(number)
                both: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
                for which in (0, 1):
                    notes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in read}
                    site.run({name: _noting(notes[name], mask) for name in read}, number, which)
                    both.append(notes)
                into = pairs.fitted if number < self.n_fitted else pairs.held
                for use in range(len(both[0][read[0]])):
                    into.add(*wanted(*({name: notes[name][use] for name in read} for notes in both)))
        return pairs

    def normed(self, norm: str) -> Wanted:
        """Pairs of what a norm of the child gives before its weight, and what the parent's gives."""
        bare = _bare(self.child.get_submodule(norm))
        return lambda p, c: (bare(c[norm][0]), p[norm][1], None)

    def fit_gain(self, norm: str, pairs: Both, gram: Tensor, reading: Tensor) -> None:
        """A norm's weight and bias; the matrices as in `lathe.reshape.regress.fit_gain`."""
        start = self.gain(norm)
        fitted = fit_gain(start, pairs.fitted, gram, reading)
        before, after = (gain_error(gain, pairs.held, gram, reading) for gain in (start, fitted))
        # As a share of what was to be reached, the part of it that is constant put back in.
        reached = reading.T @ torch.linalg.pinv(gram, hermitian=True) @ reading
        wanted = max(float((pairs.held.wanted[:-1, :-1] * reached).sum()), 1e-300)
        self.keep(norm, _gain_tensors(norm, fitted), 1 + after / wanted, 1 + before / wanted)


def _bare(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm without its weight and bias."""
    centred, eps = isinstance(norm, nn.LayerNorm), norm.eps

    def normed(x: Tensor) -> Tensor:
        wide = x.double()
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # type: ignore[operator]

    return normed


def _noting(notes: list[tuple[Tensor, Tensor]], rows: Tensor) -> Ear:
    def ear(given: Tensor, out: Tensor) -> None:
        # One row a sequence where there are two dimensions.
        both = (given, out) if given.dim() == 2 else (given.flatten(0, -2)[rows], out.flatten(0, -2)[rows])
        notes.append((both[0].cpu(), both[1].cpu()))

    return ear


def linear_tensors(name: str, linear: Linear) -> dict[str, Tensor]:
    """A linear layer's tensors by the blueprint's names."""
    return {f"{name}.weight": linear.weight} | ({} if linear.bias is None else {f"{name}.bias": linear.bias})


def _gain_tensors(name: str, gain: Gain) -> dict[str, Tensor]:
    return {f"{name}.weight": gain.weight} | ({} if gain.bias is None else {f"{name}.bias": gain.bias})
