"""Samples laid into rows, as the tensors that a model is called with.

A packed row carries `segment_ids` (which sample a position belongs to, −1 for padding) and `position_ids`
(counted from 0 in each sample); attention stays inside a segment, so padding is a segment of its own and
needs no mask. Rows that hold one sample each, for objectives that ask something of the row as a whole,
carry an `attention_mask` instead, as any other program would make it.

The decoder's inputs are made here, sample by sample: shifting a whole packed row would show each sample the
end of its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lathe.objectives.base import IGNORED, IntArray, Sample, SpecialTokens


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what of it counts.

    `inputs` are the model's keyword arguments, B × T. `tokens` counts what is no padding, on both sides;
    `targets` the labels that are asked. `name` says which batch of the data it is.

    `row_weight` is what a mean over the rows counts beside one over the targets. It is 1 unless the batch is a part
    of a larger one, whose targets are spread less evenly than its rows.
    """

    inputs: dict[str, Tensor]
    tokens: int
    targets: int
    name: str = ""
    row_weight: float = 1.0

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        moved = {key: value.to(device, non_blocking=True) for key, value in self.inputs.items()}
        return replace(self, inputs=moved)


@dataclass(frozen=True)
class Layout:
    """How samples become tensors.

    Args:
        two_sided: whether labels are the decoder's.
        packed: whether a row may hold several samples.
        multiple: row lengths are rounded up to a multiple of it, and never past `length` or `target_length`.
    """

    special: SpecialTokens
    two_sided: bool
    length: int
    target_length: int
    packed: bool = True
    multiple: int = 8

    def batch(self, rows: Sequence[Sequence[Sample]], name: str = "") -> Batch:
        """One batch of rows, each of one sample or more."""
        inputs = self._side("", [[s.input_ids for s in row] for row in rows], self.length)
        tokens = sum(len(s.input_ids) for row in rows for s in row)
        length = inputs["input_ids"].shape[1]
        labels = [[s.labels for s in row] for row in rows]
        if self.two_sided:
            shifted = [[self._shift(one) for one in row] for row in labels]
            inputs |= self._side("decoder_", shifted, self.target_length)
            tokens += sum(len(one) for row in labels for one in row)
            length = inputs["decoder_input_ids"].shape[1]
        if "labels" not in rows[0][0].numbers:
            inputs["labels"] = _fill(labels, length, IGNORED)
        types = [[s.token_type_ids for s in row if s.token_type_ids is not None] for row in rows]
        if any(types):
            inputs["token_type_ids"] = _fill(types, inputs["input_ids"].shape[1], 0)
        for key in rows[0][0].numbers:
            inputs[key] = torch.tensor([row[0].numbers[key] for row in rows])
        self._join_segments(inputs)
        return Batch(inputs, tokens, int((inputs["labels"] != IGNORED).sum()), name)

    def _side(self, prefix: str, rows: list[list[IntArray]], limit: int) -> dict[str, Tensor]:
        longest = max(sum(len(one) for one in row) for row in rows)
        length = min(-(-longest // self.multiple) * self.multiple, limit)
        pad = 0 if self.special.pad is None else self.special.pad
        made = {f"{prefix}input_ids": _fill(rows, length, pad)}
        if not self.packed:
            made[f"{prefix}attention_mask"] = _fill(
                [[np.ones(len(one), np.int64) for one in row] for row in rows], length, 0
            )
        elif longest < length or any(len(row) > 1 or len(row[0]) < length for row in rows):
            numbers = [[np.full(len(one), i) for i, one in enumerate(row)] for row in rows]
            places = [[np.arange(len(one)) for one in row] for row in rows]
            made[f"{prefix}segment_ids"] = _fill(numbers, length, -1)
            made[f"{prefix}position_ids"] = _fill(places, length, 0)
        return made

    def _join_segments(self, inputs: dict[str, Tensor]) -> None:
        """Cross-attention compares both sides' segments, so one side's are never left out alone."""
        if not self.two_sided:
            return
        for one, other in (("", "decoder_"), ("decoder_", "")):
            if f"{one}segment_ids" in inputs and f"{other}segment_ids" not in inputs:
                inputs[f"{other}segment_ids"] = torch.zeros_like(inputs[f"{other}input_ids"])

    def _shift(self, labels: IntArray) -> IntArray:
        start = labels[-1] if self.special.decoder_start is None else self.special.decoder_start
        return np.concatenate(([start], labels[:-1]))


def _fill(rows: Sequence[Sequence[IntArray]], length: int, empty: int) -> Tensor:
    filled = np.full((len(rows), length), empty, dtype=np.int64)
    for i, row in enumerate(rows):
        joined = row[0] if len(row) == 1 else np.concatenate(row)
        filled[i, : len(joined)] = joined
    return torch.from_numpy(filled)
