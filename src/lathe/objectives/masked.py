"""Masked language modelling (BERT §3.1): guess 15 % of the tokens from both sides.

Of the chosen positions, 80 % are shown as `[MASK]`, 10 % as a random token and 10 % as they are, so that
the model may not trust what it sees at a position that will be asked, and fine-tuning text, which has no
`[MASK]`, looks no different. The row is `[CLS] text [SEP]`; the marks are never chosen.

A piece of n tokens has exactly `round(rate · n)` chosen positions (at least one), as in BERT's own code,
rather than each with chance `rate`: the loss of a batch is then a mean over a steady number of tokens.

`whole_words` chooses words instead of tokens (the whole-word models of BERT's second release): when `##ing` is
asked, `train` before it is hidden too, so the ending cannot be copied from the stem that gives it away. Words
are taken in a drawn order; one that would go beyond the `round(rate · n)` tokens is passed over. Where no word
fits, the first one drawn is taken, so that something is asked. What stands at each token of a chosen word is
still drawn for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.errors import RequestError
from lathe.objectives.base import IGNORED, IntArray, Record, Sample, SpecialTokens, TextObjective, rounded
from lathe.spec import share


@dataclass(frozen=True, kw_only=True)
class Masking(TextObjective):
    """BERT's masking, for every objective that has it. `rate` of the tokens are asked; of these `masked` and
    `random` are replaced; `whole_words` asks for words as a whole.
    """

    rate: float = share(0.15)
    masked: float = share(0.8)
    random: float = share(0.1)
    whole_words: bool = False

    stacks: ClassVar[tuple[str, ...]] = ("encoder",)

    def check(self) -> None:
        for token in ("mask", "cls", "sep"):
            self.special.need(token, f"the objective {self.name}")
        if self.rate == 0.0:
            raise RequestError("rate=0: nothing would be asked; expected more than 0 and below 1")
        if self.masked + self.random > 1.0:
            raise RequestError(f"masked={self.masked}, random={self.random}: expected a sum of at most 1")
        if self.whole_words and not self.special.continues:
            raise RequestError(
                "whole_words=true: no token of this tokenizer goes on with a word, so a token is a word already; "
                "leave whole_words out"
            )

    def hide(self, text: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """`text` as it is shown, and the labels, −100 where nothing is asked."""
        if self.whole_words:
            chosen = whole_words(text, self.special, rounded(self.rate, len(text)), rng)
        else:
            chosen = rng.permutation(len(text))[: rounded(self.rate, len(text))]
        fate = rng.random(len(chosen))
        shown, labels = text.copy(), np.full_like(text, IGNORED)
        labels[chosen] = text[chosen]
        shown[chosen[fate < self.masked]] = self.special.need("mask", f"the objective {self.name}")
        swapped = chosen[(fate >= self.masked) & (fate < self.masked + self.random)]
        ordinary = self.special.ordinary
        shown[swapped] = ordinary[rng.integers(len(ordinary), size=len(swapped))]
        return shown, labels

    def pair(self, first: IntArray, second: IntArray, numbers: dict[str, int], rng: np.random.Generator) -> Sample:
        """`[CLS] first [SEP] second [SEP]` with some of the tokens of both hidden; the second has token type 1."""
        shown, labels = self.hide(np.concatenate((first, second)), rng)
        cut = len(first)
        ids = _between(self.special, [shown[:cut], shown[cut:]])
        types = np.zeros_like(ids)
        types[cut + 2 :] = 1
        mark = np.array([IGNORED])
        asked = np.concatenate((mark, labels[:cut], mark, labels[cut:], mark))
        return Sample(ids, asked, types, numbers)


@dataclass(frozen=True, kw_only=True)
class Masked(Masking):
    """BERT's masked tokens, alone."""

    name: ClassVar[str] = "masked"

    def window(self, length: int) -> int:
        """The row, less `[CLS]` and `[SEP]`."""
        return length - 2

    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """The piece and its two marks."""
        return lengths + 2, np.zeros_like(lengths)

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """`[CLS] text [SEP]` with some of its tokens hidden."""
        shown, labels = self.hide(record["text"], rng)
        mark = np.array([IGNORED])
        return Sample(_between(self.special, [shown]), np.concatenate((mark, labels, mark)))


def whole_words(text: IntArray, special: SpecialTokens, budget: int, rng: np.random.Generator) -> IntArray:
    """The positions of words drawn until `budget` tokens are chosen, in the order in which they were drawn."""
    begins = ~special.continuing[text]
    begins[0] = True  # a piece may begin within a word
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(text))
    chosen: list[IntArray] = []
    left = budget
    order = rng.permutation(len(starts)).tolist()
    for word in order:
        size = int(ends[word] - starts[word])
        if size <= left:
            chosen.append(np.arange(starts[word], ends[word]))
            left -= size
        if not left:
            break
    if not chosen:
        chosen.append(np.arange(starts[order[0]], ends[order[0]]))
    return np.concatenate(chosen)


def _between(special: SpecialTokens, parts: list[IntArray]) -> IntArray:
    """`[CLS]`, and each part with a `[SEP]` after it."""
    cls, sep = (special.need(token, "a masked text") for token in ("cls", "sep"))
    return np.concatenate((np.array([cls]), *(each for part in parts for each in (part, np.array([sep])))))
