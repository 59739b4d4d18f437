"""More heads and wider heads, without changing what the model computes.

A new head reads random weights and writes nothing: its columns of the output matrix are zero. Where query heads
share key-value heads (GQA, Ainslie et al. 2023), every group must keep as many query heads as the others, so whole
groups are added, or the same number of query heads to each, or both. More key-value heads for the same query heads
are copies of the ones there are; the query heads that they part between them make them differ at once.

A wider head gets channels whose queries and values are random and whose keys and outputs are zero, so that they add
nothing to a score or to the stream. Scores are divided by √d_head, which the queries make up for. Rotary positions
give each pair of channels a frequency that depends on d_head, so such heads cannot be widened exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lathe.architecture import Architecture, Attention, Stack
from lathe.errors import RequestError
from lathe.reshape.grow import drawn
from lathe.reshape.operation import Operation, drawing
from lathe.reshape.state import State, Step


def plan_heads(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack that gets more heads, and one for each whose heads become wider."""
    operations = []
    for name, stack in done.stacks:
        old, new = stack.attention, dict(target.stacks)[name].attention
        if new.n_heads >= old.n_heads and new.kv_heads >= old.kv_heads and _counts(new) != _counts(old):
            copies(old, new.n_heads, new.kv_heads, name)  # says what is wrong before anything is done
            run = drawing(add_heads, name, new.n_heads, new.kv_heads)
            changes = {f"{name}.attention.n_heads": new.n_heads, f"{name}.attention.n_kv_heads": new.n_kv_heads}
            operations.append(Operation(changes, run))
        if new.d_head > old.d_head:
            _require_free_channels(name, stack, new.d_head)
            run = drawing(widen_heads, name, new.d_head)
            operations.append(Operation({f"{name}.attention.d_head": new.d_head}, run))
    return operations


def _counts(spec: Attention) -> tuple[int, int]:
    return spec.n_heads, spec.kv_heads


def copies(spec: Attention, n_heads: int, n_kv_heads: int, name: str) -> int:
    """How often each key-value head has to be copied before heads can be added around it.

    Raises:
        RequestError: the groups cannot grow to these numbers without changing what a head reads.
    """
    old, new = spec.n_heads // spec.kv_heads, n_heads // n_kv_heads
    for times in range(1, old + 1):
        if old % times == 0 and old // times <= new and spec.kv_heads * times <= n_kv_heads:
            return times
    raise RequestError(
        f"{name}.n_heads={n_heads} with n_kv_heads={n_kv_heads}: the {spec.kv_heads} group(s) of {old} query heads do "
        f"not fit into groups of {new}; choose {old} or more query heads for each key-value head"
    )


def prefixes(stack_name: str, stack: Stack) -> list[str]:
    """Every attention of a stack, by module name; shared ones once."""
    kinds = ("attention", "cross_attention") if stack.cross_attention else ("attention",)
    return [f"{stack_name}.{kind}.{index}" for kind in kinds for index in range(stack.n_attentions)]


def add_heads(
    state: State, stack_name: str, n_heads: int, n_kv_heads: int, *, generator: torch.Generator
) -> tuple[State, Step]:
    """A stack's attentions with more heads, random in and zero out. Exact.

    Raises:
        RequestError: groups that cannot grow to these numbers.
    """
    stack = dict(state.architecture.stacks)[stack_name]
    spec = stack.attention
    times = copies(spec, n_heads, n_kv_heads, stack_name)
    per_group, new_per_group = spec.n_heads // spec.kv_heads // times, n_heads // n_kv_heads
    groups = spec.kv_heads * times
    queries = [
        group * per_group + slot if group < groups and slot < per_group else None
        for group in range(n_kv_heads)
        for slot in range(new_per_group)
    ]
    keys = [group // times if group < groups else None for group in range(n_kv_heads)]

    def random(beside: Tensor, shape: tuple[int, ...]) -> Tensor:
        return drawn(beside, shape, generator)

    changed = state.blank()
    for prefix in prefixes(stack_name, stack):
        for letter, where in (("q", queries), ("k", keys), ("v", keys)):
            weight = f"{prefix}.{letter}.weight"
            changed[weight] = _placed(state.wide(weight), 0, spec.d_head, where, random)
            bias = f"{prefix}.{letter}.bias"
            if bias in state.tensors:
                changed[bias] = _placed(state.wide(bias), 0, spec.d_head, where, _nothing)
        weight = f"{prefix}.o.weight"
        changed[weight] = _placed(state.wide(weight), 1, spec.d_head, queries, _nothing)
    relative = f"{stack_name}.relative_bias.weight"
    if relative in state.tensors:
        changed[relative] = _placed(state.wide(relative), 1, 1, queries, _nothing)
    name = f"add {stack_name} heads {spec.n_heads} → {n_heads}"
    if n_kv_heads != n_heads or spec.kv_heads != spec.n_heads:
        name += f", key-value heads {spec.kv_heads} → {n_kv_heads}"
    sizes = {f"{stack_name}.attention.n_heads": n_heads, f"{stack_name}.attention.n_kv_heads": n_kv_heads}
    return state.with_(changed, sizes), Step(name, True, {})


def _nothing(_: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _placed(
    tensor: Tensor, dim: int, unit: int, where: list[int | None], new: Callable[[Tensor, tuple[int, ...]], Tensor]
) -> Tensor:
    """The heads of `tensor` along `dim`, each at the places that name it; the other places hold `new` ones."""
    heads = tensor.movedim(dim, 0).unflatten(0, (-1, unit))
    out = new(tensor, (len(where), *heads.shape[1:]))
    for place, head in enumerate(where):
        if head is not None:
            out[place] = heads[head]
    return out.flatten(0, 1).movedim(0, dim)


def _require_free_channels(name: str, stack: Stack, d_head: int) -> None:
    if stack.positions.kind == "rotary":
        raise RequestError(
            f"{name}.d_head={d_head}: rotary positions fix d_head at {stack.attention.d_head}; change n_heads instead"
        )


def widen_heads(state: State, stack_name: str, d_head: int, *, generator: torch.Generator) -> tuple[State, Step]:
    """Every head of a stack with more channels. Exact.

    Raises:
        RequestError: rotary positions.
    """
    stack = dict(state.architecture.stacks)[stack_name]
    _require_free_channels(stack_name, stack, d_head)
    spec = stack.attention
    extra = d_head - spec.d_head
    # Scores are divided by √d_head, which is now larger.
    factor = math.sqrt(d_head / spec.d_head) if spec.scaled else 1.0
    changed = state.blank()
    for prefix in prefixes(stack_name, stack):
        for part, dim, is_random in (("q", 0, True), ("k", 0, False), ("v", 0, True), ("o", 1, False)):
            for leaf in ("weight", "bias") if part != "o" else ("weight",):
                name = f"{prefix}.{part}.{leaf}"
                if name not in state.tensors:
                    continue
                tensor = state.wide(name) * (factor if part == "q" else 1.0)
                heads = tensor.movedim(dim, 0).unflatten(0, (-1, spec.d_head))
                shape = (heads.shape[0], extra, *heads.shape[2:])
                new = drawn(tensor, shape, generator) if is_random and leaf == "weight" else _nothing(tensor, shape)
                changed[name] = torch.cat((heads, new), 1).flatten(0, 1).movedim(0, dim)
    step = Step(f"widen {stack_name} heads {spec.d_head} → {d_head}", True, {})
    return state.with_(changed, {f"{stack_name}.attention.d_head": d_head}), step
