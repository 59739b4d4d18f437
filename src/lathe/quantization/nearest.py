"""Scales for a matrix, and each weight at the nearest code.

A scale has to choose between the largest weight of its group, which it should reach, and the many small ones, which a
finer grid would serve better. So several are tried for each group, from the one that reaches the largest weight down
to 60% of it, and the one with the least squared error is taken (as the observers of common toolkits do). Where the
inputs are known, the error of a weight counts as much as its input is loud: what is to stay is the output.

Codes of 8 bits use −127 … 127: the range is symmetric then, and one code is no loss.

Shape suffixes: O outputs, I inputs, G groups in a row, S weights in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.model.codes import Codes

_SHARES = [1.0 - 0.02 * number for number in range(21)]  # of the largest weight, which scales that are tried reach
_AT_ONCE = 2**24  # weights


@dataclass(frozen=True)
class Grid:
    """Where the codes of a matrix stand: the scale and the zero of each group.

    Args:
        scales_OG: in the matrix's type.
        zeros_OG: whole numbers in that type; None where codes are symmetric.
        bits: 8 or 4.
    """

    scales_OG: Tensor
    zeros_OG: Tensor | None
    bits: int

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -127 if self.bits == 8 and self.zeros_OG is None else -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << self.bits - 1) - 1

    def codes(self, weight_OGS: Tensor) -> Tensor:
        """The nearest codes, O × G × S, in the weights' type."""
        whole = weight_OGS / self.scales_OG[..., None]
        if self.zeros_OG is not None:
            whole = whole + self.zeros_OG[..., None]
        return whole.round_().clamp_(self.lowest, self.highest)

    def numbers(self, codes_OGS: Tensor) -> Tensor:
        """What codes stand for."""
        if self.zeros_OG is not None:
            codes_OGS = codes_OGS - self.zeros_OG[..., None]
        return codes_OGS * self.scales_OG[..., None]


def choose_grid(
    weight_OI: Tensor, *, bits: int, group_size: int, symmetric: bool, loud_I: Tensor | None = None
) -> Grid:
    """The grid with the least squared error, group by group.

    Args:
        weight_OI: the matrix; its scales come in its type.
        group_size: weights that share a scale; 0 for a row. It divides I.
        loud_I: how much the error of each column counts; all alike where left out.
    """
    step = max(_AT_ONCE // weight_OI.shape[1], 1)
    parts = [_choose(rows_OI, bits, group_size, symmetric, loud_I) for rows_OI in weight_OI.split(step)]
    zeros = [part.zeros_OG for part in parts if part.zeros_OG is not None]
    return Grid(torch.cat([part.scales_OG for part in parts]), torch.cat(zeros) if zeros else None, bits)


def _choose(weight_OI: Tensor, bits: int, group_size: int, symmetric: bool, loud_I: Tensor | None) -> Grid:
    weight_OGS = _grouped(weight_OI.to(torch.float32), group_size)
    counts_GS = None if loud_I is None else _grouped(loud_I.to(torch.float32)[None], group_size)[0]
    best: Grid | None = None
    least_OG = torch.empty(0)
    for share in _SHARES:
        grid = _reaching(weight_OGS, share, bits, symmetric, weight_OI.dtype)
        error_OGS = (grid.numbers(grid.codes(weight_OGS)) - weight_OGS).square_()
        error_OG = (error_OGS if counts_GS is None else error_OGS * counts_GS).sum(-1)
        if best is None:
            best, least_OG = grid, error_OG
            continue
        better_OG = error_OG < least_OG
        zeros_OG = None
        if best.zeros_OG is not None and grid.zeros_OG is not None:
            zeros_OG = torch.where(better_OG, grid.zeros_OG, best.zeros_OG)
        best = Grid(torch.where(better_OG, grid.scales_OG, best.scales_OG), zeros_OG, bits)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    assert best is not None
    return best


def nearest(weight_OI: Tensor, grid: Grid) -> Codes:
    """Each weight at its nearest code."""
    weight_OGS = weight_OI.to(torch.float32).reshape(*grid.scales_OG.shape, -1)
    return finished(grid.codes(weight_OGS).flatten(1), grid, weight_OI.dtype)


def finished(codes_OI: Tensor, grid: Grid, dtype: torch.dtype) -> Codes:
    """Codes and their grid as they are stored."""
    zeros_OG = None if grid.zeros_OG is None else grid.zeros_OG.to(torch.int8)
    return Codes(codes_OI.to(torch.int8).contiguous(), grid.scales_OG.to(dtype), zeros_OG, grid.bits)


def _grouped(matrix_OI: Tensor, group_size: int) -> Tensor:
    rows, columns = matrix_OI.shape
    return matrix_OI.reshape(rows, 1 if group_size == 0 else columns // group_size, -1)


def _reaching(weight_OGS: Tensor, share: float, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid that reaches `share` of each group's largest weight."""
    levels = 2**bits - 1
    if symmetric:
        scales_OG = weight_OGS.abs().amax(-1) * share / (2 ** (bits - 1) - 1)
        return Grid(_positive(scales_OG, dtype), None, bits)
    low_OG = weight_OGS.amin(-1).clamp(max=0) * share
    high_OG = weight_OGS.amax(-1).clamp(min=0) * share
    scales_OG = _positive((high_OG - low_OG) / levels, dtype)
    lowest = -(2 ** (bits - 1))
    zeros_OG = (lowest - low_OG / scales_OG).round_().clamp_(lowest, lowest + levels)
    return Grid(scales_OG, zeros_OG, bits)


def _positive(scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored, so that codes are chosen for those; a group of zeros has any scale."""
    stored = scales_OG.to(dtype).to(torch.float32)
    return torch.where(stored == 0, 1.0, stored)
