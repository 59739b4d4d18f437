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
brings them nearer, fit by fit. So a refit is never worse than none on that text, and the step's note names what was
left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lathe.architecture import Stack
from lathe.blueprint import blueprint
from lathe.reshape.calibrate import Batch, Ear, heard
from lathe.reshape.fitting import Fitting, Notes, Parts, Run, Site, linear_tensors
from lathe.reshape.refit_head import fit_head, head_products, last_site
from lathe.reshape.regress import best
from lathe.reshape.state import State, Step
from lathe.reshape.stream import advance, entering, layer_parts, leaving
from lathe.reshape.walk import ONE_ROW, entered, shape_of, split, stack_of, through, token_rows

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
        return cut, [Step(f"no refit at d_model {width}", True, {}, note=ONE_ROW)]
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
    memories = work.memories or (None, None)
    parents, childs = (
        entering(model, name, work.batches, memories=memory)
        for model, memory in zip((work.parent, work.child), memories)
    )
    work.streams, work.at = (parents, childs), 0
    for path, layers in _sublayers(name, stack):
        _move(work, name, layers[0])
        _sublayer(work, name, stack, path, layers[-1] + 1)
    _move(work, name, stack.n_layers)
    if stack.final_norm:
        _final_norm(work, name)
    if name == "encoder" and work.child.decoder is not None:
        for model, streams in zip((work.parent, work.child), work.streams):
            leaving(model, name, streams)
        work.memories = work.streams


def _move(work: Fitting, name: str, layer: int) -> None:
    for model, streams in zip((work.parent, work.child), work.streams):
        for number in range(work.at, layer):
            advance(model, name, streams, number)
    work.at = layer


def _running(work: Fitting, name: str, end: int) -> Run:
    def run(ears: Mapping[str, Ear], number: int, which: int) -> None:
        model = (work.parent, work.child)[which]
        with heard(model, ears):
            through(model, name, work.streams[which][number], range(work.at, end))

    return run


def _layers(work: Fitting, name: str, end: int) -> Parts:
    """The modules from where the streams stand to layer `end`."""
    return lambda model: layer_parts(model, name, range(work.at, end))


def _rows(work: Fitting, name: str) -> Callable[[int], Tensor]:

    def rows(number: int) -> Tensor:
        return token_rows(work.child, name, work.streams[1].shape(number), work.batches[number])

    return rows


def _memory_rows(work: Fitting, number: int) -> Tensor:
    batch = work.batches[number]
    return token_rows(work.child, "encoder", shape_of(work.child, "encoder", batch), batch)


def _sublayer(work: Fitting, name: str, stack: Stack, path: str, end: int) -> None:
    """Readers, then the writer, then the norm of one sublayer, whose last use is in layer `end` − 1."""
    site = Site(_running(work, name, end), _rows(work, name), _layers(work, name, end))
    if ".cross_attention." in path:
        _read(work, path, ("q",), site)
        _read(work, path, ("k", "v"), replace(site, rows=lambda number: _memory_rows(work, number)))
    elif ".attention." in path:
        _read(work, path, ("q", "k", "v"), site)
    else:
        _read(work, path, ("up", "gate") if stack.feed_forward.gated else ("up",), site)
    writer = f"{path}.down" if ".feed_forward." in path else f"{path}.o"
    _write(work, path, writer, site, pre_norm=stack.norm_position == "pre")
    if stack.norm_position == "post":
        _norm(work, f"{path}.norm", site)


def _read(work: Fitting, path: str, parts: tuple[str, ...], site: Site) -> None:
    first = f"{path}.{parts[0]}"
    pairs = work.gather(site, [first], lambda p, c: (c[first][0], p[first][0], None))
    work.fit_readers(f"{path}.{'/'.join(parts)}", [f"{path}.{part}" for part in parts], pairs)


def _write(work: Fitting, path: str, writer: str, site: Site, *, pre_norm: bool) -> None:
    norm = f"{path}.norm"
    into, centred = work.into, isinstance(work.parent.get_submodule(norm), nn.LayerNorm)

    def lacking(p: Notes, c: Notes) -> tuple[Tensor, Tensor, Tensor | None]:
        # A norm before the sublayer sees the stream as it was, one after it the sum.
        after = p[norm][0].double() + (p[writer][1].double() if pre_norm else 0.0)
        skip = c[norm][0].double() - (0.0 if pre_norm else c[writer][1].double())
        return c[writer][0], after @ into - skip, 1.0 / _size(after, centred=centred)

    pairs = work.gather(site, [writer, norm], lacking)
    chosen, before, missed = best(work.linear(writer), pairs.fitted, pairs.held)
    work.keep(writer, linear_tensors(writer, chosen), missed, before)


def _norm(work: Fitting, norm: str, site: Site, into: Tensor | None = None) -> None:
    """A norm whose output is the stream, channel by channel."""
    onto = (work.into if into is None else into).T
    pairs = work.gather(site, [norm], work.normed(norm))
    work.fit_gain(norm, pairs, torch.eye(len(onto), dtype=torch.float64), onto)


def _entering(work: Fitting, name: str) -> Site:
    """A stack's input."""

    def run(ears: Mapping[str, Ear], number: int, which: int) -> None:
        model = (work.parent, work.child)[which]
        memory_BSD = None if work.memories is None else work.memories[which][number].x_BTD
        with heard(model, ears):
            entered(model, name, work.batches[number], memory_BSD)

    def rows(number: int) -> Tensor:
        batch = work.batches[number]
        return token_rows(work.child, name, shape_of(work.child, name, batch), batch)

    return Site(run, rows, lambda model: (model.embedding, stack_of(model, name).input))


def _input_norm(work: Fitting, name: str) -> None:
    _norm(work, f"{name}.input.norm", _entering(work, name), work.embed)


def _projection(work: Fitting, name: str) -> None:
    """The matrix that lifts a narrower embedding to the stream that was."""
    projection = "embedding.projection"
    site = _entering(work, name)
    pairs = work.gather(site, [projection], lambda p, c: (c[projection][0], p[projection][1], None))
    chosen, before, missed = best(work.linear(projection), pairs.fitted, pairs.held)
    work.keep(projection, linear_tensors(projection, chosen), missed, before)


def _final_norm(work: Fitting, name: str) -> None:
    """A stack's last norm where nothing that was fitted takes its weight in: a tied table reads it, or no one."""
    norm = f"{name}.norm"
    reading = [p for p in blueprint(work.state.architecture) if p.norm == norm and not p.is_bias]
    tied = any(p.tied_to for p in reading)
    if reading and not tied:
        return

    if not tied:
        _norm(work, norm, last_site(work, name, _rows(work, name)))
        return
    pairs = work.gather(last_site(work, name), [norm], work.normed(norm))
    work.fit_gain(norm, pairs, *head_products(work, "embedding.tokens.weight"))


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
