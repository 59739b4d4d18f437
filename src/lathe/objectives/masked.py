"""Masked language modelling (BERT §3.1): guess 15 % of the tokens from both sides.

Of the chosen positions, 80 % are shown as `[MASK]`, 10 % as a random token and 10 % as they are, so that
the model may not trust what it sees at a position that will be asked, and fine-tuning text, which has no
`[MASK]`, looks no different. The row is `[CLS] text [SEP]`; the marks are never chosen.

A piece of n tokens has exactly `round(rate · n)` chosen positions (at least one), as in BERT's own code,
rather than each with chance `rate`: the loss of a batch is then a mean over a steady number of tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.errors import RequestError
from lathe.objectives.base import IGNORED, IntArray, Objective, Record, Sample, SpecialTokens, rounded
from lathe.spec import share


@dataclass(frozen=True, kw_only=True)
class Masked(Objective):
    """BERT's masked tokens. `rate` of the tokens are asked; of these `masked` and `random` are replaced."""

    rate: float = share(0.15)
    masked: float = share(0.8)
    random: float = share(0.1)

    stacks: ClassVar[tuple[str, ...]] = ("encoder",)
    name: ClassVar[str] = "masked"

    def check(self) -> None:
        for token in ("mask", "cls", "sep"):
            self.special.need(token, "the objective masked")
        if self.rate == 0.0:
            raise RequestError("rate=0: nothing would be asked; expected more than 0 and below 1")
        if self.masked + self.random > 1.0:
            raise RequestError(f"masked={self.masked}, random={self.random}: expected a sum of at most 1")

    def window(self, length: int) -> int:
        """The row, less `[CLS]` and `[SEP]`."""
        return length - 2

    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """The piece and its two marks."""
        return lengths + 2, np.zeros_like(lengths)

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """`[CLS] text [SEP]` with some of its tokens hidden."""
        text = record["text"]
        shown, labels = self.hide(text, rng)
        cls, sep = (self.special.need(token, "the objective masked") for token in ("cls", "sep"))
        ids = np.concatenate((np.array([cls]), shown, np.array([sep])))
        asked = np.concatenate((np.array([IGNORED]), labels, np.array([IGNORED])))
        return Sample(ids, asked)

    def hide(self, text: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """`text` as it is shown, and the labels, −100 where nothing is asked."""
        chosen = rng.permutation(len(text))[: rounded(self.rate, len(text))]
        fate = rng.random(len(chosen))
        shown, labels = text.copy(), np.full_like(text, IGNORED)
        labels[chosen] = text[chosen]
        shown[chosen[fate < self.masked]] = self.special.need("mask", "the objective masked")
        swapped = chosen[(fate >= self.masked) & (fate < self.masked + self.random)]
        ordinary = _ordinary(self.special)
        shown[swapped] = ordinary[rng.integers(len(ordinary), size=len(swapped))]
        return shown, labels


@functools.lru_cache(maxsize=8)
def _ordinary(special: SpecialTokens) -> IntArray:
    return special.ordinary()
