"""Fewer layers: those that change the direction of the stream least are left out.

A layer's importance is 1 − cos(stream before, stream after), the mean over the tokens of the text (Minitron,
Muralidharan et al. 2024, §3.1; ShortGPT, Men et al. 2024). A stack whose layers share weights drops whole turns of
its cycle, the same number from each group, so that the pattern stays; what they share stays with the layers left.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from lathe.architecture import Architecture, Stack
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import NO_TEXT, Batch
from lathe.reshape.operation import Operation, by_stack, measured
from lathe.reshape.state import State, Step
from lathe.reshape.stream import advance, entering
from lathe.reshape.walk import token_rows


def plan_layers(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack that becomes shallower."""
    return by_stack(done, target, "n_layers", partial(measured, prune_layers), grows=False)


def prune_layers(
    model: Transformer, batches: Iterable[Batch], state: State, stack_name: str, n_layers: int
) -> tuple[State, Step]:
    """A stack with its `n_layers` most important layers; `model` is the model of `state`.

    Raises:
        RequestError: no text, or a number that the sharing pattern cannot be divided into.
    """
    stack = dict(state.architecture.stacks)[stack_name]
    stack.sharing.check_depth(n_layers)
    importance = layer_importance(model, batches, stack_name)
    kept = _kept(stack, importance, n_layers)
    architecture = state.architecture.with_({f"{stack_name}.n_layers": n_layers})
    new = dict(architecture.stacks)[stack_name]
    source = {
        "attention": {new.attention_index(i): stack.attention_index(layer) for i, layer in enumerate(kept)},
        "feed_forward": {new.feed_forward_index(i): stack.feed_forward_index(layer) for i, layer in enumerate(kept)},
    }
    source["cross_attention"] = source["attention"]
    tensors = state.copied()
    for parameter in stored(architecture):
        where = parameter.name.split(".")
        if where[0] == stack_name and where[1] in source:
            old = source[where[1]][int(where[2])]
            tensors.take(parameter.name, state.tensors, ".".join((*where[:2], str(old), *where[3:])))
    gone = {f"{stack_name} layer {i}": float(importance[i]) for i in range(stack.n_layers) if i not in kept}
    name = f"prune {stack_name} layers {stack.n_layers} → {n_layers}"
    measures = "how far each layer that went turned the stream, 1 − cos(before, after)"
    return State(architecture, tensors), Step(name, not gone, gone, measures)


def _kept(stack: Stack, importance: Tensor, n_layers: int) -> list[int]:
    """The layers that stay, in order: the most important turns of the cycle in each group."""
    groups, cycle = stack.sharing.groups, stack.sharing.cycle
    turns = importance.view(groups, -1, cycle).sum(2)
    best = turns.topk(n_layers // groups // cycle, dim=1).indices.sort(1).values
    per_group = stack.n_layers // groups
    return [
        group * per_group + turn * cycle + place
        for group, row in enumerate(best.tolist())
        for turn in row
        for place in range(cycle)
    ]


def layer_importance(model: Transformer, batches: Iterable[Batch], stack_name: str) -> Tensor:
    """1 − cos(stream before, stream after) for each layer of a stack, the mean over the text's tokens.

    Raises:
        RequestError: no tokens.
    """
    stack, every = dict(model.architecture.stacks)[stack_name], list(batches)
    total, tokens = torch.zeros(stack.n_layers, dtype=torch.float64), 0
    training = model.training
    model.eval()
    with torch.no_grad():
        streams = entering(model, stack_name, every)
        for layer in range(stack.n_layers):

            def count(number: int, before_BTD: Tensor, after_BTD: Tensor, layer: int = layer) -> None:
                rows = token_rows(model, stack_name, before_BTD.shape[:2], every[number])
                one, other = (x.flatten(0, -2)[rows].to("cpu", torch.float64) for x in (before_BTD, after_BTD))
                total[layer] += (1 - torch.cosine_similarity(one, other, dim=-1)).sum()

            advance(model, stack_name, streams, layer, count)
        for number, batch in enumerate(every):
            tokens += int(token_rows(model, stack_name, streams.shape(number), batch).sum())
    model.train(training)
    if not tokens:
        raise RequestError(NO_TEXT)
    return total / tokens
