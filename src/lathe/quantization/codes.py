"""A matrix as whole numbers and scales, and the numbers packed as the file holds them.

A weight w is stored as a code q of 8 or 4 bits: w ≈ s · (q − z). The scale s belongs to one output channel (a row of
the matrix), or to a group of 32, 64 or 128 weights that stand beside each other in a row. z is 0 where the codes are
symmetric; else it is a code itself and lets a group whose weights lie to one side use all of its codes.

Codes of 8 bits are `int8`. Codes of 4 bits lie eight to an `int32`, as `compressed-tensors` packs them: q + 8, the
first in the lowest four bits. Read as bytes, byte j of a row holds code 2j in its low half and code 2j + 1 in its
high half.

Shape suffixes: O outputs (rows), I inputs, G groups in a row (1 where a row has one scale), W words of 32 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OFFSET = 8  # what is added to a code of 4 bits before it is packed
PER_WORD = 8  # codes of 4 bits in an int32


@dataclass(frozen=True)
class Codes:
    """One matrix in codes.

    Args:
        codes_OI: int8; −128 … 127, or −8 … 7 for 4 bits.
        scales_OG: floating point.
        zeros_OG: int8, in the codes' range; None for symmetric codes.
        bits: 8 or 4.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Weights that share a scale; 0 where a whole row does."""
        groups = self.scales_OG.shape[1]
        return 0 if groups == 1 else self.codes_OI.shape[1] // groups

    def dequantized(self) -> Tensor:
        """The matrix that the codes stand for, O × I, in the scales' type."""
        return dequantize(self.codes_OI, self.scales_OG, self.zeros_OG)


def dequantize(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None) -> Tensor:
    """The matrix s · (q − z), O × I, in the scales' type."""
    rows, groups = scales_OG.shape
    wide_OGI = codes_OI.view(rows, groups, -1).to(scales_OG.dtype)
    if zeros_OG is not None:
        wide_OGI = wide_OGI - zeros_OG.to(scales_OG.dtype)[..., None]
    return (wide_OGI * scales_OG[..., None]).view(rows, -1)


def pack4(codes_OI: Tensor) -> Tensor:
    """Codes of 4 bits, int8, as int32 words, O × W; the last word of a row is filled up with zero bits."""
    rows, columns = codes_OI.shape
    words = math.ceil(columns / PER_WORD)
    halves = torch.zeros(rows, words * PER_WORD, dtype=torch.uint8, device=codes_OI.device)
    halves[:, :columns] = (codes_OI + OFFSET).to(torch.uint8)
    pairs = halves.view(rows, words * PER_WORD // 2, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def unpack4(packed_OW: Tensor, columns: int) -> Tensor:
    """The codes of `pack4`, O × I, int8.

    Args:
        columns: I.
    """
    pairs = packed_OW.contiguous().view(torch.uint8)
    halves = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)
    return halves[:, :columns].to(torch.int8) - OFFSET
