"""Wider feed-forwards, more layers and a head of its own, without changing what the model computes.

*Feed-forward* (Net2Net, Chen et al. 2016, but random in and zero out instead of copies): a new neuron reads random
weights and writes nothing, because its column of the output matrix is zero. That column has a gradient from the
first training step, and no two new neurons see the same input, so none is a copy of another.

*Depth* (LLaMA Pro, Wu et al. 2024, §3): a new layer is a copy of the layer before it whose writers are zero, so it
adds nothing to the stream. Only pre-norm stacks have a stream that a layer can leave alone: after post-norm,
`norm(x + 0)` is still a norm.

*Untying* stores the token table once more, as the head's own.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.reshape.operation import Operation, Run, by_stack, drawing, plain
from lathe.reshape.state import State, Step

_WEAKEST = 0.02  # the deviation of new weights beside a matrix that is all zeros


def drawn(beside: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random weights, float64, as large on average as those of `beside`."""
    size = float(beside.square().mean().sqrt()) if beside.numel() else 0.0
    return (size or _WEAKEST) * torch.randn(shape, generator=generator, dtype=torch.float64)


def plan_feed_forward(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack whose feed-forward becomes wider."""
    return by_stack(done, target, "feed_forward.d_ff", partial(drawing, widen_feed_forward), grows=True)


def widen_feed_forward(state: State, stack_name: str, d_ff: int, *, generator: torch.Generator) -> tuple[State, Step]:
    """A stack's feed-forwards with more neurons, random in and zero out; gates too. Exact."""
    stack = dict(state.architecture.stacks)[stack_name]
    old, changed = stack.feed_forward.d_ff, state.blank()
    for index in range(stack.n_feed_forwards):
        for parameter, dim in state.along(f"{stack_name}.feed_forward.{index}.ffn"):
            tensor = state.wide(parameter.name)
            shape = list(tensor.shape)
            shape[dim] = d_ff - old
            if parameter.role == "reader" and not parameter.is_bias:
                new = drawn(tensor, tuple(shape), generator)
            else:
                new = torch.zeros(shape, dtype=torch.float64)
            changed[parameter.name] = torch.cat((tensor, new), dim)
    step = Step(f"widen {stack_name} feed-forward {old} → {d_ff}", True, {})
    return state.with_(changed, {f"{stack_name}.feed_forward.d_ff": d_ff}), step


def plan_depth(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack that becomes deeper."""

    def run(name: str, wanted: int) -> Run:
        _require_free_layers(done, name, wanted)
        return plain(deepen, name, wanted)

    return by_stack(done, target, "n_layers", run, grows=True)


def _require_free_layers(architecture: Architecture, name: str, n_layers: int) -> None:
    stack = dict(architecture.stacks)[name]
    if stack.norm_position == "post":
        raise RequestError(
            f"{name}.n_layers={n_layers}: a post-norm layer that adds nothing still norms the stream, so new layers "
            f"would change the model; keep {stack.n_layers} or fewer, or widen d_ff or d_model instead"
        )
    if stack.sharing.attention or stack.sharing.feed_forward:
        raise RequestError(
            f"{name}.n_layers={n_layers}: a new layer would share weights that write (sharing={stack.sharing}) and "
            f"change the model; keep {stack.n_layers} or fewer layers"
        )


def deepen(state: State, stack_name: str, n_layers: int) -> tuple[State, Step]:
    """A pre-norm stack with more layers, spread evenly, each a copy of the one before it that writes nothing. Exact.

    Raises:
        RequestError: a post-norm stack, or one whose layers share weights.
    """
    _require_free_layers(state.architecture, stack_name, n_layers)
    old = dict(state.architecture.stacks)[stack_name].n_layers
    source = [layer * old // n_layers for layer in range(n_layers)]
    architecture = state.architecture.with_({f"{stack_name}.n_layers": n_layers})
    tensors = state.copied()
    for parameter in stored(architecture):
        where = parameter.name.split(".")
        if where[0] != stack_name or where[1] not in ("attention", "cross_attention", "feed_forward"):
            continue
        layer = int(where[2])
        old_name = ".".join((*where[:2], str(source[layer]), *where[3:]))
        is_new = layer > 0 and source[layer] == source[layer - 1]
        if is_new and parameter.role == "writer":
            tensors[parameter.name] = torch.zeros_like(state.tensors[old_name])
        else:
            tensors.take(parameter.name, state.tensors, old_name)
    return State(architecture, tensors), Step(f"deepen {stack_name} {old} → {n_layers}", True, {})


def plan_untying(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation where a tied head becomes one of its own."""
    old, new = done.head.language, target.head.language
    if old is None or new is None or not old.tied or new.tied:
        return []
    return [Operation({"head.language": dataclasses.replace(old, tied=False)}, plain(untie))]


def untie(state: State) -> tuple[State, Step]:
    """The model with a head of its own, which starts as the token table. Exact."""
    table = state.wide("embedding.tokens.weight").clone()
    untied = state.with_({"head.language.output.weight": table}, {"head.language.tied": False})
    return untied, Step("untie the head", True, {})
