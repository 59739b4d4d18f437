"""How order enters: sinusoidal vectors, rotary angles, relative-bias buckets.

Attention without positions is a set operation: permute the tokens and the outputs permute with them.
Learned and sinusoidal positions are vectors added to the embeddings. Rotary positions turn each pair of
a query's and a key's channels by an angle proportional to the position, so that their product depends on
the distance alone (Su et al. 2021, §3.2). Relative bias adds a learned number to each score, one per head
and distance bucket; buckets are exact for near tokens and logarithmic for far ones (T5, §2.1).

Shape suffixes: B batch, T query positions, S key positions, H heads, K d_head, E width of the table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lathe.architecture import Positions, RotaryScaling

Rotation = tuple[Tensor, Tensor]  # cos and sin, B × 1 × T × K


def sinusoid(positions_BT: Tensor, width: int) -> Tensor:
    """Sines in the even channels, cosines in the odd ones, B × T × E (Vaswani et al. 2017, §3.5)."""
    channels = torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float32)
    angles = positions_BT[..., None].float() * torch.exp(channels * (-math.log(10000.0) / width))
    out = torch.empty(*positions_BT.shape, width, device=positions_BT.device)
    out[..., 0::2] = angles.sin()
    out[..., 1::2] = angles.cos()[..., : width // 2]
    return out


def rotation(positions_BT: Tensor, spec: Positions, d_head: int) -> Rotation:
    """The cosines and sines by which queries and keys at `positions_BT` turn, float32."""
    exponents = torch.arange(0, d_head, 2, device=positions_BT.device, dtype=torch.float32) / d_head
    frequencies = 1.0 / spec.theta**exponents
    if spec.scaling is not None:
        frequencies = stretch(frequencies, spec.scaling)
    angles = positions_BT[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def stretch(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Rotary frequencies for a longer context; see `RotaryScaling`."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotate(x_BHTK: Tensor, by: Rotation) -> Tensor:
    """Turn channel pair (i, i + K/2) of every head."""
    cos, sin = by
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTK * cos.to(x_BHTK.dtype) + turned * sin.to(x_BHTK.dtype)


def bucket(distance: Tensor, spec: Positions, *, causal: bool) -> Tensor:
    """The bucket of `distance` = key position − query position, 0 … n_buckets − 1.

    A stack that sees both ways spends half of the buckets on keys to the right. Half of each side's
    buckets hold one distance each; the rest grow logarithmically up to `max_distance`.
    """
    n, offset = spec.n_buckets, torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        n //= 2
        offset = (distance > 0).long() * n
        distance = distance.abs()
    exact = n // 2
    far = torch.log(distance.float().clamp(min=1) / exact) / math.log(spec.max_distance / exact) * (n - exact)
    far = (exact + far.long()).clamp(max=n - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A learned number per bucket and head, added to the scores of every layer of a stack."""

    def __init__(self, spec: Positions, n_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.spec, self.causal = spec, causal
        self.weight = nn.Parameter(torch.zeros(spec.n_buckets, n_heads))

    def forward(self, queries_BT: Tensor, keys_S: Tensor) -> Tensor:
        """B × H × T × S for queries and keys that stand at these places in their rows."""
        buckets = bucket(keys_S - queries_BT[..., None], self.spec, causal=self.causal)
        return self.weight[buckets].permute(0, 3, 1, 2)
