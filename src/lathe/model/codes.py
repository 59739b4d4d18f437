"""A matrix as whole numbers and scales, and the numbers packed as the file holds them.

A weight w is stored as a code q of 8 or 4 bits: w ≈ s · (q − z). The scale s belongs to one output channel (a row of
the matrix), or to a group of 32, 64 or 128 weights that stand beside each other in a row. z is 0 where the codes are
symmetric; else it is a code itself and lets a group whose weights lie to one side use all of its codes.

Packed codes are `compressed-tensors`' own: q + 2^(bits − 1), as many to an `int32` as it holds, the first in the
lowest bits. Read as bytes, a code of 8 bits is a byte, and of codes of 4 bits byte j of a row holds code 2j in its low
half and code 2j + 1 in its high half.

Shape suffixes: O outputs (rows), I inputs, G groups in a row (1 where a row has one scale), W words of 32 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32  # bits


@dataclass(frozen=True)
class Codes:
    """One matrix in codes.

    Args:
        codes_OI: int8; −128 … 127, or −8 … 7 for 4 bits.
        scales_OG: floating point.
        zeros_OG: int8, in the codes' range; None for symmetric codes.
        bits: 8 or 4.
        activations: `none`, or `int8` where its products take inputs in int8 too; that needs 8 bits, a scale a row
            and no zeros.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None
    bits: int
    activations: str = "none"

    @property
    def group_size(self) -> int:
        """Weights that share a scale; 0 where a whole row does."""
        groups = self.scales_OG.shape[1]
        return 0 if groups == 1 else self.codes_OI.shape[1] // groups

    @property
    def nbytes(self) -> int:
        """Bytes of the codes as they are stored, the scales and the zeros."""
        zeros = 0 if self.zeros_OG is None else self.zeros_OG.numel()
        return (self.codes_OI.numel() + zeros) * self.bits // 8 + self.scales_OG.nbytes

    def dequantized(self) -> Tensor:
        """The matrix that the codes stand for, O × I, in the scales' type."""
        return dequantize(self.codes_OI, self.scales_OG, self.zeros_OG)


def dequantize(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None) -> Tensor:
    """The matrix s · (q − z), O × I, in the scales' type."""
    rows, groups = scales_OG.shape
    wide_OGI = codes_OI.reshape(rows, groups, -1).to(scales_OG.dtype)
    if zeros_OG is not None:
        wide_OGI = wide_OGI - zeros_OG.to(scales_OG.dtype)[..., None]
    return (wide_OGI * scales_OG[..., None]).view(rows, -1)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes, int8, as int32 words, O × W; the last word of a row is filled up with zero bits."""
    rows, columns = codes_OI.shape
    words = math.ceil(columns * bits / WORD)
    raised = torch.zeros(rows, words * WORD // bits, dtype=torch.uint8, device=codes_OI.device)
    raised[:, :columns] = (codes_OI.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        pairs = raised.view(rows, -1, 2)
        raised = pairs[..., 0] | (pairs[..., 1] << 4)
    return raised.contiguous().view(torch.int32)


def unpack(packed_OW: Tensor, columns: int, bits: int) -> Tensor:
    """The codes of `pack`, O × I, int8.

    Args:
        columns: I.
    """
    raised = packed_OW.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack((raised & 0xF, raised >> 4), dim=-1).flatten(1)
        return raised[:, :columns].to(torch.int8) - 8
    return (raised[:, :columns] ^ 0x80).view(torch.int8)
