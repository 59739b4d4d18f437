"""Narrower heads: each head's products q·k and o·v at a smaller rank.

A head uses its queries and keys only in the product `xᵀ Wqᵀ Wk y`, and its values only in `Wo Wv y`. Both have
rank d_head; the best product of a smaller rank is their singular value decomposition (Eckart & Young 1936),
split evenly between the two sides. Key-value groups stack their query heads, which share one decomposition.

A key bias adds the same number to all of a query's scores, which softmax ignores, so it is dropped. A value
bias passes through attention as it is, because weights sum to one, and moves into the output bias.
Rotary positions turn single pairs of channels, so their q and k cannot be rewritten this way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.architecture import Attention
from lathe.errors import RequestError
from lathe.reshape.state import State, Step


def narrow_heads(state: State, stack_name: str, d_head: int) -> tuple[State, Step]:
    """Every head of a stack at `d_head` channels.

    Raises:
        RequestError: rotary positions, or a larger `d_head` than there is.
    """
    stack = dict(state.architecture.stacks)[stack_name]
    old = stack.attention.d_head
    if stack.positions.kind == "rotary":
        raise RequestError(
            f"{stack_name}.d_head={d_head}: rotary positions fix d_head at {old}; change n_heads instead"
        )
    if d_head > old:
        raise RequestError(f"{stack_name}.d_head={d_head}: a head of {old} channels can only be narrowed")
    changed = state.blank()
    kinds = ("attention", "cross_attention") if stack.cross_attention else ("attention",)
    for kind in kinds:
        for index in range(stack.n_attentions):
            prefix = f"{stack_name}.{kind}.{index}"
            changed |= _narrow_scores(state, prefix, stack.attention, d_head)
            changed |= _narrow_values(state, prefix, stack.attention, d_head)
    step = Step(f"narrow {stack_name} heads {old} → {d_head}", d_head == old, {})
    return state.with_(changed, {f"{stack_name}.attention.d_head": d_head}), step


def split_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of `left @ rightᵀ` with `rank` columns each, the singular values split evenly.

    Heads may be wider than what they read, and then the product has a lower rank than asked: the rest is zeros.
    """
    left_q, left_r = torch.linalg.qr(left)
    right_q, right_r = torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    root = s[:rank].sqrt()
    factors = left_q @ (u[:, :rank] * root), right_q @ (vh[:rank].T * root)
    missing = rank - len(root)
    return F.pad(factors[0], (0, missing)), F.pad(factors[1], (0, missing))


def _narrow_scores(state: State, prefix: str, spec: Attention, rank: int) -> dict[str, Tensor]:
    per_group = spec.n_heads // spec.kv_heads
    q = _with_bias(state, f"{prefix}.q").view(spec.kv_heads, per_group, spec.d_head, -1)
    k = state.wide(f"{prefix}.k.weight").view(spec.kv_heads, spec.d_head, -1)
    # Scores are divided by √d_head, which is now smaller.
    factor = (rank / spec.d_head) ** 0.25 if spec.scaled else 1.0
    queries, keys = [], []
    for group in range(spec.kv_heads):
        left = q[group].transpose(1, 2).flatten(0, 1)  # query heads stacked: (per_group · inputs) × d_head
        new_q, new_k = split_product(left, k[group].T, rank)
        queries.append(new_q.view(per_group, -1, rank).transpose(1, 2).flatten(0, 1) * factor)
        keys.append(new_k.T * factor)
    out = _without_bias(f"{prefix}.q", torch.cat(queries), bias=spec.bias)
    out[f"{prefix}.k.weight"] = torch.cat(keys)
    if spec.bias:
        out[f"{prefix}.k.bias"] = torch.zeros(spec.kv_heads * rank, dtype=torch.float64)
    return out


def _narrow_values(state: State, prefix: str, spec: Attention, rank: int) -> dict[str, Tensor]:
    per_group = spec.n_heads // spec.kv_heads
    absorbed = spec.bias and spec.output_bias
    v = state.wide(f"{prefix}.v.weight") if absorbed else _with_bias(state, f"{prefix}.v")
    v = v.view(spec.kv_heads, spec.d_head, -1)
    o = state.wide(f"{prefix}.o.weight")
    d_model = o.shape[0]
    o_heads = o.view(d_model, spec.kv_heads, per_group, spec.d_head)
    outputs, values = [], []
    for group in range(spec.kv_heads):
        left = o_heads[:, group].transpose(0, 1).flatten(0, 1)  # (per_group · d_model) × d_head
        new_o, new_v = split_product(left, v[group].T, rank)
        outputs.append(new_o.view(per_group, d_model, rank).transpose(0, 1))
        values.append(new_v.T)
    out = {f"{prefix}.o.weight": torch.stack(outputs, 1).flatten(1)}
    if not absorbed:
        return out | _without_bias(f"{prefix}.v", torch.cat(values), bias=spec.bias)
    out[f"{prefix}.v.weight"] = torch.cat(values)
    out[f"{prefix}.v.bias"] = torch.zeros(spec.kv_heads * rank, dtype=torch.float64)
    bias = state.wide(f"{prefix}.v.bias").view(spec.kv_heads, 1, spec.d_head).expand(-1, per_group, -1)
    out[f"{prefix}.o.bias"] = state.wide(f"{prefix}.o.bias") + o @ bias.reshape(-1)
    return out


def _with_bias(state: State, name: str) -> Tensor:
    """A weight with its bias, if any, as one more input column."""
    weight = state.wide(f"{name}.weight")
    bias = f"{name}.bias"
    return torch.cat((weight, state.wide(bias)[:, None]), 1) if bias in state.tensors else weight


def _without_bias(name: str, joined: Tensor, *, bias: bool) -> dict[str, Tensor]:
    """The reverse of `_with_bias`."""
    if not bias:
        return {f"{name}.weight": joined}
    return {f"{name}.weight": joined[:, :-1].contiguous(), f"{name}.bias": joined[:, -1].contiguous()}
