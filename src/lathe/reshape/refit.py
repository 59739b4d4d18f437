"""A narrow model fitted to its parent by least squares, layer by layer, whatever cut it and wherever its norms stand.

A cut leaves errors behind: channels are gone, norms divide by another length, and every layer reads what the layers
before it got wrong. Part of that a layer can make up for, because what is gone correlates with what stays. So the
child is walked through calibration text beside its parent (`lathe.reshape.walk`), and each sublayer, once what comes
before it is fitted, gets in this order

- its readers (q, k, v; gate, up; the memory's k and v; the head): ridge regression from what the child reads to what
  the parent's reader gave, each held to the weights that the cut left (`lathe.reshape.regress`);
- its writer (o, down): regression from what the child's writer reads to what its stream lacks, the parent's stream in
  the child's channels less the child's own, tokens weighted by 1/‖x‖² because the next norm divides by that;
- its norm where it stands after the sum (post-norm), and norms on embeddings: weight and bias, channel by channel.
  A norm before readers needs none: they take it in.

The tables are the parent's, projected: no other table is nearer to what the parent's write. One that is also the head
is a reader too, and gets a compromise: ridge regression on the head's side, the ridge being its part as a writer. The
norm before it keeps a weight, which is fitted to the logits, tokens of the vocabulary counted as often as the parent
predicts them. Layers that share weights are fitted on all of their uses together.

A masked-LM head's transform is no linear layer: it is fitted to be nearly one (`lathe.reshape.transform`) and then led
towards the parent's predictions (`lathe.reshape.refit_predictions`).

Every eighth row of the text fits nothing. It chooses each ridge and whether a fit is kept: only one that misses less
of what it should give on that text. In the end the child's predictions are held against the parent's there (KL;
without a language head, squares). Should they be farther off than before, it all is done again, keeping only what
brings them nearer, fit by fit. So a refit is never worse than none on that text, and the step names what was left as
it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lathe.architecture import Stack
from lathe.blueprint import blueprint
from lathe.reshape.calibrate import Batch, Ear, heard
from lathe.reshape.fitting import Fitting, Notes, Run, linear_tensors
from lathe.reshape.refit_head import fit_head, head_products
from lathe.reshape.regress import best
from lathe.reshape.state import State, Step
from lathe.reshape.walk import asked_rows, entered, split, stack_of, through, token_rows

_MOST_TOKENS = 65_536


def refit(
    parent: State,
    cut: State,
    into: Tensor,
    batches: Sequence[Batch],
    *,
    embed: bool = False,
    pooled: Tensor | None = None,
) -> tuple[State, list[Step]]:
    """The cut state, fitted.

    Args:
        parent: before the width was cut, its heads as the cut state's are.
        into: old × new: the parent's stream in the child's channels.
        batches: keyword arguments of the model, one mapping each.
        embed: whether it is the embedding's own width that was cut; the stream then has the channels it had.
        pooled: which of the parent's pooled channels the child keeps; its first ones where left out.
    """
    fitted, held = split(batches, _MOST_TOKENS)
    width = cut.architecture.d_model
    if not held:
        return cut, [Step(f"no refit at d_model {width}", True, {}, note="one row of text cannot be split")]
    eye = torch.eye(width, dtype=torch.float64)
    for by_predictions in (False, True):
        work = Fitting(parent, cut, eye if embed else into, fitted, held, into if embed else None, by_predictions)
        with torch.no_grad():
            for name, stack in cut.architecture.stacks:
                fit_stack(work, name, stack)
            fit_head(work, pooled)
        if work.now <= work.start:
            break
    return work.result()


def fit_stack(work: Fitting, name: str, stack: Stack) -> None:
    """Every sublayer of a stack, in the order in which tokens meet them."""
    factorised = work.state.architecture.embedding.d_embed is not None
    if stack.input_norm and (work.embed is not None or not factorised):
        _input_norm(work, name)
    if work.embed is not None and name == next(work.state.architecture.stacks)[0]:
        _projection(work, name)
    work.streams = (
        [entered(work.parent, name, batch) for batch in work.batches],
        [entered(work.child, name, batch) for batch in work.batches],
    )
    work.at = 0
    for path, layers in _sublayers(name, stack):
        _move(work, name, layers[0])
        run = _running(work, name, layers[-1] + 1)
        _sublayer(work, name, stack, path, run)
    _move(work, name, stack.n_layers)
    if stack.final_norm:
        _final_norm(work, name)


def _move(work: Fitting, name: str, layer: int) -> None:
    for model, streams in zip((work.parent, work.child), work.streams):
        for held in streams:
            held.x_BTD = through(model, name, held, range(work.at, layer))
    work.at = layer


def _running(work: Fitting, name: str, end: int) -> Run:
    def run(ears: Mapping[str, Ear], number: int, which: int) -> None:
        model = (work.parent, work.child)[which]
        with heard(model, ears):
            through(model, name, work.streams[which][number], range(work.at, end))

    return run


def _rows(work: Fitting, name: str) -> Callable[[int], Tensor]:
    both = work.child.encoder is not None and work.child.decoder is not None

    def rows(number: int) -> Tensor:
        shape = work.streams[1][number].x_BTD.shape[:2]
        return token_rows(name, shape, work.batches[number], both=both)

    return rows


def _memory_rows(work: Fitting, number: int) -> Tensor:
    memory = work.streams[1][number].around.memory_BSD
    assert memory is not None
    return token_rows("encoder", memory.shape[:2], work.batches[number], both=True)


def _sublayer(work: Fitting, name: str, stack: Stack, path: str, run: Run) -> None:
    """Readers, then the writer, then the norm of one sublayer."""
    rows = _rows(work, name)
    if ".cross_attention." in path:
        _read(work, path, ("q",), run, rows)
        _read(work, path, ("k", "v"), run, lambda number: _memory_rows(work, number))
    elif ".attention." in path:
        _read(work, path, ("q", "k", "v"), run, rows)
    else:
        _read(work, path, ("up", "gate") if stack.feed_forward.gated else ("up",), run, rows)
    writer = f"{path}.down" if ".feed_forward." in path else f"{path}.o"
    _write(work, path, writer, run, rows, pre_norm=stack.norm_position == "pre")
    if stack.norm_position == "post":
        _norm(work, f"{path}.norm", run, rows)


def _read(work: Fitting, path: str, parts: tuple[str, ...], run: Run, rows: Callable[[int], Tensor]) -> None:
    first = f"{path}.{parts[0]}"
    pairs = work.gather(run, [first], rows, lambda p, c: (c[first][0], p[first][0], None))
    work.fit_readers(f"{path}.{'/'.join(parts)}", [f"{path}.{part}" for part in parts], pairs)


def _write(work: Fitting, path: str, writer: str, run: Run, rows: Callable[[int], Tensor], *, pre_norm: bool) -> None:
    norm = f"{path}.norm"
    into, centred = work.into, isinstance(work.parent.get_submodule(norm), nn.LayerNorm)

    def lacking(p: Notes, c: Notes) -> tuple[Tensor, Tensor, Tensor | None]:
        # A norm before the sublayer sees the stream as it was, one after it the sum.
        after = p[norm][0] + (p[writer][1] if pre_norm else 0.0)
        skip = c[norm][0] - (0.0 if pre_norm else c[writer][1])
        return c[writer][0], after @ into - skip, 1.0 / _size(after, centred=centred)

    pairs = work.gather(run, [writer, norm], rows, lacking)
    chosen, before, missed = best(work.linear(writer), pairs.fitted, pairs.held)
    work.keep(writer, linear_tensors(writer, chosen), missed, before)


def _norm(work: Fitting, norm: str, run: Run, rows: Callable[[int], Tensor], into: Tensor | None = None) -> None:
    """A norm whose output is the stream, channel by channel."""
    onto = (work.into if into is None else into).T
    pairs = work.gather(run, [norm], rows, work.normed(norm))
    work.fit_gain(norm, pairs, torch.eye(len(onto), dtype=torch.float64), onto)


def _entering(work: Fitting, name: str) -> tuple[Run, Callable[[int], Tensor]]:
    """How a stack's input is run, and which of its rows are tokens."""
    both = work.child.encoder is not None and work.child.decoder is not None

    def run(ears: Mapping[str, Ear], number: int, which: int) -> None:
        model = (work.parent, work.child)[which]
        with heard(model, ears):
            entered(model, name, work.batches[number])

    def rows(number: int) -> Tensor:
        shape = entered(work.parent, name, work.batches[number]).x_BTD.shape[:2]
        return token_rows(name, shape, work.batches[number], both=both)

    return run, rows


def _input_norm(work: Fitting, name: str) -> None:
    run, rows = _entering(work, name)
    _norm(work, f"{name}.input.norm", run, rows, work.embed)


def _projection(work: Fitting, name: str) -> None:
    """The matrix that lifts a narrower embedding to the stream that was."""
    run, rows = _entering(work, name)
    projection = "embedding.projection"
    pairs = work.gather(run, [projection], rows, lambda p, c: (c[projection][0], p[projection][1], None))
    chosen, before, missed = best(work.linear(projection), pairs.fitted, pairs.held)
    work.keep(projection, linear_tensors(projection, chosen), missed, before)


def _final_norm(work: Fitting, name: str) -> None:
    """A stack's last norm where nothing that was fitted takes its weight in: a tied table reads it, or no one."""
    norm = f"{name}.norm"
    reading = [p for p in blueprint(work.state.architecture) if p.norm == norm and not p.is_bias]
    tied = any(p.tied_to for p in reading)
    if reading and not tied:
        return

    def run(ears: Mapping[str, Ear], number: int, which: int) -> None:
        model = (work.parent, work.child)[which]
        with heard(model, ears):
            stack_of(model, name).leave(work.streams[which][number].x_BTD)

    if not tied:
        _norm(work, norm, run, _rows(work, name))
        return

    def rows(number: int) -> Tensor:
        return asked_rows(work.child, work.streams[1][number].x_BTD.shape[:2], work.batches[number])

    pairs = work.gather(run, [norm], rows, work.normed(norm))
    old, new = (state.wide("embedding.tokens.weight") for state in (work.before, work.state))
    work.fit_gain(norm, pairs, *head_products(work, new, old))


def _size(x_ND: Tensor, *, centred: bool) -> Tensor:
    """Each row's mean square, which is what the next norm divides by, and never nothing."""
    if centred:
        x_ND = x_ND - x_ND.mean(-1, keepdim=True)
    return x_ND.square().mean(-1).clamp_min(1e-12)


def _sublayers(name: str, stack: Stack) -> Iterator[tuple[str, list[int]]]:
    """Every sublayer once, in the order of first use, with the layers that use it."""
    uses: dict[str, list[int]] = {}
    for layer in range(stack.n_layers):
        attention = stack.attention_index(layer)
        paths = [f"{name}.attention.{attention}"]
        if stack.cross_attention:
            paths.append(f"{name}.cross_attention.{attention}")
        for path in [*paths, f"{name}.feed_forward.{stack.feed_forward_index(layer)}"]:
            uses.setdefault(path, []).append(layer)
    yield from uses.items()
