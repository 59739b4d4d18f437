"""Causal language modelling: each token from those before it (GPT-2 §2; Bengio et al. 2003).

A document is `bos? tokens eos?`, with the marks that the tokenizer has. Of one that is longer than a row each piece
begins with the mark, as whatever the model reads does, and the last one alone ends with it: a text that goes on has no
end that could be learnt. Position t of the model predicts token t + 1, so the labels are the inputs themselves and the
model shifts them. The first label of a piece is left out: nothing stands before it, and in a packed row its neighbour
belongs to another document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.objectives.base import IGNORED, LAST, IntArray, Record, Sample, TextObjective

_WHOLE = np.ones(1, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Causal(TextObjective):
    """Next-token prediction over packed documents."""

    stacks: ClassVar[tuple[str, ...]] = ("decoder",)
    name: ClassVar[str] = "causal"
    least: ClassVar[int] = 1

    def window(self, length: int) -> int:
        """The row, less the marks."""
        return length - self.special.n_marks

    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """The piece and its marks; of one whose document goes on, one less is taken."""
        return lengths + self.special.n_marks, np.zeros_like(lengths)

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """Nothing is drawn: the text asks itself."""
        ids = self.special.framed(record["text"], ends=bool(record.get(LAST, _WHOLE)[0]))
        labels = ids.copy()
        labels[0] = IGNORED
        return Sample(ids, labels)
