"""Layers of a trained stack come to share their weights, or stop sharing them (ALBERT, Lan et al. 2020, §3.1).

Every layer uses one attention and one feed-forward, and a sharing pattern says which. So another pattern asks, for
each new set of weights, which old sets the layers held that will use it. One old set, or several equal ones: it is
copied, and nothing changes; that is all that unsharing is. Several: they become one,

- `mean`: the mean over the layers, each first written in the order of the middle one's heads and neurons
  (`lathe.reshape.align`; exact in itself), so that like is averaged with like;
- `middle`: the middle layer's weights as they are.

*Refit*, where there is text. On the way through the parent every layer's new sublayer is given what the old one read,
and its output matrix is fitted by least squares to what the old ones wrote, on all of its layers at once, with a small
ridge towards where it starts. A post-norm's weight and bias are then regressed in the same way, channel by channel.
The fit stays where it brings the predictions nearer to the parent's on rows that it has not seen.

Sharing saves parameters and bytes, not computation. Encoder and decoder are two stacks and share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture, Stack
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.align import align_attention, align_feed_forward
from lathe.reshape.calibrate import NO_TEXT, Batch
from lathe.reshape.divergence import Divergence
from lathe.reshape.operation import Context, Operation
from lathe.reshape.spill import Tensors
from lathe.reshape.state import ENDS, State, Step
from lathe.reshape.stream import blank, entering, held, layer_parts, model_of
from lathe.reshape.walk import ONE_ROW, split, through, token_rows

SHARE_METHODS = ("mean", "middle")
_KINDS = ("attention", "cross_attention", "feed_forward")
_RIDGE = 1e-4
_MOST_TOKENS = 2**20
_SAME = 1e-6  # weights that differ by less than this share of their size are one layer's, written twice


def plan_sharing(done: Architecture, target: Architecture, method: str) -> list[Operation]:
    """An operation for each stack whose layers are to share their weights in another way.

    Raises:
        RequestError: an unknown method.
    """
    if method not in SHARE_METHODS:
        raise RequestError(f"share={method!r}: expected one of {', '.join(SHARE_METHODS)}")
    operations = []
    for name, stack in done.stacks:
        wanted = dict(target.stacks)[name].sharing
        if wanted != stack.sharing:
            wanted.check_depth(stack.n_layers)
            operations.append(Operation({f"{name}.sharing": wanted}, partial(_run, name, str(wanted), method)))
    return operations


def _run(name: str, sharing: str, method: str, context: Context, state: State) -> tuple[State, list[Step]]:
    shared, step = share(state, name, sharing, method)
    if step.exact or not context.batches:
        return shared, [step]
    fitted_on, apart = split(context.batches, _MOST_TOKENS)
    if not apart:
        return shared, [step, replace(_NO_REFIT, note=ONE_ROW)]
    parent = context.current(state)
    fitted, second = refit_shared(parent, fitted_on, state, shared, name)
    distance = Divergence(parent, apart, torch.eye(parent.architecture.d_model, dtype=torch.float64))
    before, after = distance(context.current(shared)), distance(context.current(fitted))
    told = {"before": before, **second.detail, "after": after}
    measures = f"share of the wanted outputs missed{ENDS}on text held out: {distance.measures}"
    if after < before:
        return fitted, [step, replace(second, detail=told, measures=measures)]
    left = replace(_NO_REFIT, detail=told, measures=measures, note="a fit came no nearer on text held out")
    return shared, [step, left]


_NO_REFIT = Step("no refit of what is shared", True, {})


def share(state: State, stack_name: str, sharing: str, method: str = "mean") -> tuple[State, Step]:
    """A stack whose layers share their weights as `sharing` says; no text is read.

    The step is exact where every new set of weights comes from one old one or from equal ones. Its detail holds, for
    each new set that does not, the share of its layers' squared weights that it lost.
    """
    old = dict(state.architecture.stacks)[stack_name]
    architecture = state.architecture.with_({f"{stack_name}.sharing": sharing})
    new = dict(architecture.stacks)[stack_name]
    tensors, lost, difference = state.copied(), dict[str, float](), 0.0
    for kind in kinds_of(old):
        for index, layers in members_of(new, kind).items():
            sources = [index_of(old, kind, layer) for layer in layers]
            path, into = f"{stack_name}.{kind}", f"{stack_name}.{kind}.{index}."
            if len(set(sources)) == 1:
                was = f"{path}.{sources[0]}."
                for name in [name for name in state.tensors if name.startswith(was)]:
                    tensors.take(into + name.removeprefix(was), state.tensors, name)
                continue
            merged, apart = _merged(state, path, sources, old, kind, method)
            tensors |= {into + leaf: tensor for leaf, tensor in merged.items()}
            lost[f"{path}.{index}"] = apart
            difference = max(difference, apart)
    for name in set(tensors) - {p.name for p in stored(architecture)}:
        del tensors[name]
    exact = difference <= _SAME**2
    title = f"share {stack_name} layers {old.sharing} → {new.sharing}"
    return State(architecture, tensors), Step(f"{title} ({method})" if lost else title, exact, lost)


def kinds_of(stack: Stack) -> list[str]:
    """The kinds of sublayer that the stack has."""
    return [kind for kind in _KINDS if kind != "cross_attention" or stack.cross_attention]


def index_of(stack: Stack, kind: str, layer: int) -> int:
    """Which set of weights of a kind a layer uses."""
    return stack.feed_forward_index(layer) if kind == "feed_forward" else stack.attention_index(layer)


def members_of(stack: Stack, kind: str) -> dict[int, list[int]]:
    """The layers that use each set of weights of a kind."""
    members: dict[int, list[int]] = {}
    for layer in range(stack.n_layers):
        members.setdefault(index_of(stack, kind, layer), []).append(layer)
    return members


def sublayer_of(state: State, path: str) -> dict[str, Tensor]:
    """The tensors below a path, by the rest of their names, float64."""
    prefix = f"{path}."
    return {n.removeprefix(prefix): state.wide(n) for n in state.tensors if n.startswith(prefix)}


def _merged(
    state: State, path: str, sources: Sequence[int], stack: Stack, kind: str, method: str
) -> tuple[dict[str, Tensor], float]:
    """One set of weights for all of `sources`, and the share of their squared weights that it is away from them."""
    middle = sources[len(sources) // 2]
    reference, ordered = sublayer_of(state, f"{path}.{middle}"), state.blank()
    for index in dict.fromkeys(sources):
        part = reference if index == middle else _like(reference, sublayer_of(state, f"{path}.{index}"), stack, kind)
        ordered |= {f"{index}.{leaf}": tensor for leaf, tensor in part.items()}
    merged, apart, size = reference, 0.0, 0.0
    if method == "mean":
        zero = torch.zeros((), dtype=torch.float64)
        merged = {leaf: sum((ordered[f"{i}.{leaf}"] for i in sources), zero) / len(sources) for leaf in reference}
    for index in sources:
        for leaf, tensor in merged.items():
            part_of_it = ordered[f"{index}.{leaf}"]
            apart += float((part_of_it - tensor).square().sum())
            size += float(part_of_it.square().sum())
    return merged, apart / max(size, 1e-300)


def aligned(
    parts: Mapping[int, dict[str, Tensor]], middle: int, stack: Stack, kind: str
) -> dict[int, dict[str, Tensor]]:
    """Sublayers of one kind, by number, in the order of the heads and neurons of number `middle`. Exact."""
    reference = parts[middle]
    return {index: part if index == middle else _like(reference, part, stack, kind) for index, part in parts.items()}


def _like(reference: Mapping[str, Tensor], part: Mapping[str, Tensor], stack: Stack, kind: str) -> dict[str, Tensor]:
    """A sublayer in the order of another one's heads and neurons. Exact."""
    if kind == "feed_forward":
        return align_feed_forward(reference, part)
    return align_attention(reference, part, stack, cross=kind == "cross_attention")


# --- the refit on text


class _Fit:
    """Sums over the text for one matrix: what it reads and what it should write, with a 1 for the bias.

    Args:
        place: where the sums of products are kept while other layers run, under names that start with `name`.
    """

    def __init__(self, place: Tensors, name: str) -> None:
        self._place, self._name = place, name
        self.read = torch.zeros(())
        self.cross = torch.zeros(())
        self.missing = 0.0  # squares of what the matrix that there is does not write
        self.wanted = 0.0

    def rest(self) -> None:
        """Put the sums aside."""
        self._place[f"{self._name}.read"], self._place[f"{self._name}.cross"] = self.read, self.cross
        self.read = self.cross = torch.zeros(())

    def wake(self) -> None:
        """Take them up again."""
        self.read, self.cross = self._place[f"{self._name}.read"], self._place[f"{self._name}.cross"]

    def add(self, x_NI: Tensor, missing_NO: Tensor, wanted_NO: Tensor, *, bias: bool) -> None:
        x = x_NI.to("cpu", torch.float64)
        if bias:
            x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
        missing = missing_NO.to("cpu", torch.float64)
        self.read = self.read + x.T @ x
        self.cross = self.cross + x.T @ missing
        self.missing += float(missing.square().sum())
        self.wanted += float(wanted_NO.double().square().sum())

    def missed(self, step: Tensor) -> float:
        """The share of what should be written, squared, that is not once `step` is added."""
        left = self.missing - 2 * float((step * self.cross).sum()) + float((step * (self.read @ step)).sum())
        return max(left, 0.0) / max(self.wanted, 1e-300)

    def step(self) -> Tensor:
        """What to add to the matrix, inputs × outputs."""
        size = (_RIDGE * self.read.diagonal().mean()).clamp_min(1e-30)
        fitted: Tensor = torch.linalg.solve(
            self.read + size * torch.eye(len(self.read), dtype=torch.float64), self.cross
        )
        return fitted


class _NormFit:
    """Sums over the text for one norm, channel by channel: z before its weight and bias, w as it should be given."""

    def __init__(self) -> None:
        self.count = 0
        self.z = self.w = self.zz = self.zw = torch.zeros((), dtype=torch.float64)

    def add(self, z_ND: Tensor, w_ND: Tensor) -> None:
        """Count more tokens."""
        z, w = (each.to("cpu", torch.float64) for each in (z_ND, w_ND))
        self.count += len(z)
        self.z, self.w = self.z + z.sum(0), self.w + w.sum(0)
        self.zz, self.zw = self.zz + z.square().sum(0), self.zw + (z * w).sum(0)

    def fitted(self, state: State, norm: str) -> dict[str, Tensor]:
        """The norm's weight and bias, regressed channel by channel."""
        if f"{norm}.bias" not in state.tensors:
            return {f"{norm}.weight": self.zw / self.zz.clamp_min(1e-12)}
        mean_z, mean_w = self.z / self.count, self.w / self.count
        spread = (self.zz - self.count * mean_z.square()).clamp_min(1e-12)
        slope = (self.zw - self.count * mean_z * mean_w) / spread
        return {f"{norm}.weight": slope, f"{norm}.bias": mean_w - slope * mean_z}


def refit_shared(
    parent: Transformer, batches: Iterable[Batch], before: State, shared: State, stack_name: str
) -> tuple[State, Step]:
    """The shared sublayers' output matrices, and post-norms, fitted to what the parent's layers wrote.

    Args:
        parent: the model of `before`.
        shared: what `share` made of it.

    Returns:
        The fitted state, and a step whose detail is the share of the writers' output that each set still misses.

    Raises:
        RequestError: no tokens.
    """
    stack, every = dict(shared.architecture.stacks)[stack_name], list(batches)
    if not every:
        raise RequestError(NO_TEXT)
    teacher = _unshared(before, stack_name, parent)
    uses = {
        f"{stack_name}.{kind}.{index}": [f"{stack_name}.{kind}.{layer}" for layer in members]
        for kind in kinds_of(stack)
        for index, members in members_of(stack, kind).items()
        if len(members) > 1
    }
    missed: dict[str, float] = {}
    for leaves in [("o", "down")] if stack.norm_position == "pre" else [("o", "down"), ("norm",)]:
        student = _unshared(shared, stack_name, parent)
        changed, errors = _one_pass(teacher, student, every, shared, uses, leaves)
        shared = shared.with_(changed)
        missed |= errors
    return shared, Step(f"refit what the {stack_name}'s layers share", False, missed)


def _unshared(state: State, stack_name: str, like: Transformer) -> Transformer:
    """A model of the state in which every layer of the stack has modules of its own, so that each can be heard."""
    copied, _ = share(state, stack_name, "none")
    return model_of(copied, like.dtype, like.device)


def _one_pass(
    teacher: Transformer,
    student: Transformer,
    batches: Sequence[Batch],
    state: State,
    uses: dict[str, list[str]],
    leaves: tuple[str, ...],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fit `o` and `down`, or `norm`, of every shared sublayer, each layer reading what the parent's layer read."""
    name = next(iter(uses)).split(".")[0]
    stack = dict(teacher.architecture.stacks)[name]
    fits: dict[str, _Fit] = {}
    norms: dict[str, _NormFit] = {}
    said: dict[str, Tensor] = {}
    owner = {use: path for path, each in uses.items() for use in each}
    place, current = blank(teacher), batches[0]

    def hear(name: str, _: Tensor, out: Tensor) -> Tensor:
        said[name] = out
        return out

    def answer(name: str, given: Tensor, out: Tensor) -> Tensor:
        path, _, leaf = name.rpartition(".")
        wanted = said[name]
        if path in owner and leaf in leaves:
            rows = token_rows(teacher, name, given.shape[:-1], current)
            x, made, should = (t.detach().flatten(0, -2)[rows] for t in (given, out, wanted))
            target = f"{owner[path]}.{leaf}"
            if leaf == "norm":
                norms.setdefault(target, _NormFit()).add(_normed(student.get_submodule(name), x), should)
            else:
                has_bias = f"{target}.bias" in state.tensors
                fits.setdefault(target, _Fit(place, target)).add(x, should - made, should, bias=has_bias)
        # Pre-norm's norms feed a sublayer, which is the student's own; all else goes on as in the parent.
        return out if leaf == "norm" and _is_pre(student, path) else wanted

    with torch.no_grad():
        streams = entering(teacher, name, batches)
        for layer in range(stack.n_layers):
            paths, layers = [f"{name}.{kind}.{layer}" for kind in kinds_of(stack)], range(layer, layer + 1)
            forced = [f"{p}.{leaf}" for p in paths for leaf in ("o", "down", "norm") if _has(teacher, p, leaf)]
            here = [f"{owner[path]}.{leaf}" for path in paths if path in owner for leaf in leaves]
            for target in here:
                if target in fits:
                    fits[target].wake()
            with held(teacher, layer_parts(teacher, name, layers)), held(student, layer_parts(student, name, layers)):
                for number, batch in enumerate(batches):
                    current, one = batch, streams[number]
                    with _through(teacher, forced, hear):
                        streams.move(number, through(teacher, name, one, layers))
                    with _through(student, forced, answer):  # its stream is the parent's, since what it adds is
                        through(student, name, one, layers)
            for target in here:
                if target in fits:
                    fits[target].rest()
    changed: dict[str, Tensor] = {}
    missed: dict[str, float] = {}
    for target, fit in fits.items():
        fit.wake()
        step, before = fit.step(), state.wide(f"{target}.weight")
        inputs = before.shape[1]
        changed[f"{target}.weight"] = before + step[:inputs].T
        if f"{target}.bias" in state.tensors:
            changed[f"{target}.bias"] = state.wide(f"{target}.bias") + step[inputs]
        missed[target] = fit.missed(step)
        fit.rest()
    for target, norm in norms.items():
        changed |= norm.fitted(state, target)
    return changed, missed


def _normed(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """What a norm gives before its weight and bias, float64."""
    x, eps = x_ND.double(), _eps(norm)
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _eps(norm: nn.Module) -> float:
    eps: Any = norm.eps
    return float(eps)


def _has(model: Transformer, path: str, leaf: str) -> bool:
    return getattr(model.get_submodule(path), leaf, None) is not None


def _is_pre(model: Transformer, path: str) -> bool:
    return dict(model.architecture.stacks)[path.split(".")[0]].norm_position == "pre"


Answer = Callable[[str, Tensor, Tensor], Tensor]


@contextmanager
def _through(model: Transformer, names: Iterable[str], answer: Answer) -> Iterator[None]:
    """Let `answer(name, input, output)` say what each module of these names gives."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, given, out: answer(name, given[0], out)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
