"""Scaled dot-product attention (Vaswani et al. 2017, §3.2): softmax(q·kᵀ/√K + bias) v, and the sublayer around it.

`attend` is the one attention of Lathe. It hands the work to PyTorch's fused kernel. `attend_reference`
is the same sum written out; it serves when the weights themselves are asked for, and the tests hold the
two together over masks, bias, rotary positions, grouped heads, cross-attention and the cache.

Shape suffixes: B batch, T query positions, S key positions, H heads, G key-value heads, K d_head, D d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.architecture import Attention, Stack
from lathe.model.cache import LayerCache
from lathe.model.mask import Mask
from lathe.model.positions import Rotation, rotate


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Mask,
    *,
    bias_BHTS: Tensor | None = None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """What each query gathers from the values, B × H × T × K.

    Args:
        mask: which keys a query may see. A query that may see none gets a finite, meaningless answer.
        bias_BHTS: added to the scores, broadcast over B (relative positions).
        scale: what the scores are multiplied with.
        dropout: the probability with which an attention weight is dropped.
    """
    allowed = mask.allowed
    if bias_BHTS is not None:
        allowed = mask.dense(q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK.device)
        allowed = bias_BHTS if allowed is None else hide(allowed, bias_BHTS)
        allowed = allowed.to(q_BHTK.dtype)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=mask.causal and allowed is None,
        scale=scale,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
    )


def attend_reference(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Mask,
    *,
    bias_BHTS: Tensor | None = None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attend` step by step; also returns the attention weights, B × H × T × S, before dropout."""
    scores_BHTS = _scores(q_BHTK, k_BGSK, mask, bias_BHTS, scale)
    v_BHSK = v_BGSK.repeat_interleave(q_BHTK.shape[1] // v_BGSK.shape[1], dim=1)
    weights_BHTS = _softmax(scores_BHTS).to(q_BHTK.dtype)
    return F.dropout(weights_BHTS, dropout) @ v_BHSK, weights_BHTS


def attend_shared(
    q_BHTK: Tensor,
    shared: tuple[Tensor, Tensor],
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Mask,
    *,
    bias_BHTS: Tensor | None = None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attend_reference` over keys that all rows share and then each row's own, without a copy of the shared ones.

    To a key that all rows see, the rows are only more queries: one matrix product serves them all and reads it once
    (Hydragen; Juravsky et al. 2024, §3.1). Scores are joined before the softmax, so the sum is the same.

    Args:
        shared: keys and values, 1 × G × S' × K; `mask` and `bias_BHTS` count them first.
    """
    (batch, heads, length, _), (first_k, first_v) = q_BHTK.shape, shared
    groups, n_shared = first_k.shape[1:3]
    # The queries that read one key-value head stand together, those of its row and those of all rows.
    q_BGNK = q_BHTK.reshape(batch, groups, heads // groups * length, -1)
    first_BGNS = _rows_apart(_rows_together(q_BGNK) @ first_k[0].transpose(-1, -2), batch)
    scores_BGNS = torch.cat((first_BGNS, q_BGNK @ k_BGSK.transpose(-1, -2)), dim=-1) * scale
    scores_BHTS = scores_BGNS.reshape(batch, heads, length, -1)
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    allowed = mask.dense(length, scores_BHTS.shape[-1], q_BHTK.device)
    scores_BHTS = scores_BHTS if allowed is None else hide(allowed, scores_BHTS)
    weights_BHTS = _softmax(scores_BHTS).to(q_BHTK.dtype)
    weights_BGNS = F.dropout(weights_BHTS, dropout).reshape(*q_BGNK.shape[:3], -1)
    first_BGNS, own_BGNS = weights_BGNS.split((n_shared, weights_BGNS.shape[-1] - n_shared), dim=-1)
    out_BGNK = _rows_apart(_rows_together(first_BGNS) @ first_v[0], batch) + own_BGNS @ v_BGSK
    return out_BGNK.reshape(q_BHTK.shape), weights_BHTS


def _rows_together(x_BGNX: Tensor) -> Tensor:
    """All rows' vectors of each group as one list, G × B·N × X."""
    return x_BGNX.transpose(0, 1).flatten(1, 2)


def _rows_apart(x_GMX: Tensor, batch: int) -> Tensor:
    """`_rows_together` undone, B × G × N × X."""
    groups, queries, width = x_GMX.shape
    return x_GMX.reshape(groups, batch, queries // batch, width).transpose(0, 1)


def _softmax(scores_BHTS: Tensor) -> Tensor:
    wide = scores_BHTS.float() if scores_BHTS.dtype in (torch.float16, torch.bfloat16) else scores_BHTS
    return wide.softmax(dim=-1)


def _scores(q_BHTK: Tensor, k_BGSK: Tensor, mask: Mask, bias_BHTS: Tensor | None, scale: float) -> Tensor:
    k_BHSK = k_BGSK.repeat_interleave(q_BHTK.shape[1] // k_BGSK.shape[1], dim=1)
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) * scale
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    allowed = mask.dense(q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK.device)
    return scores_BHTS if allowed is None else hide(allowed, scores_BHTS)


def hide(allowed: Tensor, scores: Tensor) -> Tensor:
    """Scores, the lowest there is where a key may not be seen."""
    # The lowest finite number, not -inf: a row with no visible key must not turn into NaN.
    return torch.where(allowed, scores, torch.finfo(scores.dtype).min)


class AttentionLayer(nn.Module):
    """q, k, v, o and the norm that stands before or after them.

    With `cross`, keys and values come from the encoder's output (`memory`) instead of the stream.
    """

    def __init__(self, d_model: int, stack: Stack, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.spec: Attention = stack.attention
        a = self.spec
        self.norm = norm
        self.q = nn.Linear(d_model, a.d_q, bias=a.bias)
        self.k = nn.Linear(d_model, a.d_kv, bias=a.bias)
        self.v = nn.Linear(d_model, a.d_kv, bias=a.bias)
        self.o = nn.Linear(a.d_q, d_model, bias=a.output_bias)
        self.scale = a.d_head**-0.5 if a.scaled else 1.0
        self.dropout = dropout

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        *,
        memory_BSD: Tensor | None = None,
        bias_BHTS: Tensor | None = None,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds to the stream, B × T × D, and its weights B × H × T × S when asked for."""
        q_BHTK = _split(self.q(x_BTD), self.spec.n_heads)
        if rotation is not None:
            q_BHTK = rotate(q_BHTK, rotation)
        k_BGSK, v_BGSK = self._keys_values(x_BTD, memory_BSD, rotation, cache)
        sharing = len(q_BHTK) // len(k_BGSK) if cache is not None and cache.fixed else 1
        if sharing > 1:  # rows that read one memory are more queries to it
            q_BHTK = _gathered(q_BHTK, sharing)
        drop = self.dropout if self.training else 0.0
        seen: Tensor | None = None
        if cache is not None and cache.shared is not None:
            out_BHTK, seen = attend_shared(
                q_BHTK, cache.shared, k_BGSK, v_BGSK, mask, bias_BHTS=bias_BHTS, scale=self.scale, dropout=drop
            )
            seen = seen if weights else None
        elif weights:
            out_BHTK, seen = attend_reference(
                q_BHTK, k_BGSK, v_BGSK, mask, bias_BHTS=bias_BHTS, scale=self.scale, dropout=drop
            )
        else:
            out_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask, bias_BHTS=bias_BHTS, scale=self.scale, dropout=drop)
        if sharing > 1:
            out_BHTK = _scattered(out_BHTK, sharing)
            seen = None if seen is None else _scattered(seen, sharing)
        return self.o(out_BHTK.transpose(1, 2).flatten(2)), seen

    def scores(
        self,
        x_BTD: Tensor,
        mask: Mask,
        *,
        memory_BSD: Tensor | None = None,
        bias_BHTS: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """What the softmax is given, for who wants to see it: q·k times the scale, and the bias, B × H × T × S.

        The lowest number of the type stands where a key may not be seen.
        """
        q_BHTK = _split(self.q(x_BTD), self.spec.n_heads)
        if rotation is not None:
            q_BHTK = rotate(q_BHTK, rotation)
        k_BGSK, _ = self._keys_values(x_BTD, memory_BSD, rotation, None)
        return _scores(q_BHTK, k_BGSK, mask, bias_BHTS, self.scale)

    def _keys_values(
        self, x_BTD: Tensor, memory_BSD: Tensor | None, rotation: Rotation | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.fixed:
            return cache.read()
        source = x_BTD if memory_BSD is None else memory_BSD
        k_BGSK, v_BGSK = (
            _split(self.k(source), self.spec.kv_heads),
            _split(self.v(source), self.spec.kv_heads),
        )
        if rotation is not None:
            k_BGSK = rotate(k_BGSK, rotation)
        return (k_BGSK, v_BGSK) if cache is None else cache.write(k_BGSK, v_BGSK)


def _split(x_BTI: Tensor, heads: int) -> Tensor:
    batch, length, _ = x_BTI.shape
    return x_BTI.view(batch, length, heads, -1).transpose(1, 2)


def _gathered(x_BHTK: Tensor, rows: int) -> Tensor:
    """Each `rows` rows as one with as many times the queries."""
    _, heads, length, width = x_BHTK.shape
    return x_BHTK.reshape(-1, rows, heads, length, width).transpose(1, 2).reshape(-1, heads, rows * length, width)


def _scattered(x_BHTK: Tensor, rows: int) -> Tensor:
    """What `_gathered` made one, as the rows it was."""
    batch, heads, length, width = x_BHTK.shape
    x_BHRTK = x_BHTK.reshape(batch, heads, rows, length // rows, width)
    return x_BHRTK.transpose(1, 2).reshape(batch * rows, heads, length // rows, width)
