"""Masked tokens and next-sentence prediction (BERT §3.1, "Task #2").

Segment A is the beginning of a piece. Segment B is what follows it half the time, and half the time it comes
from another document, beginning at a sentence of it and no longer than what it replaces. The model says which.

`next_sentence_label` is 0 where B follows A and 1 where it is from elsewhere, as in BERT's own checkpoints. What
B replaces is not seen in that epoch; the next one draws anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.objectives.base import IntArray, Record, Sample
from lathe.objectives.sentence import SentencePair, place_to_cut


@dataclass(frozen=True, kw_only=True)
class NextSentence(SentencePair):
    """BERT's pretraining: masked tokens, and whether the second segment follows the first."""

    name: ClassVar[str] = "next_sentence"
    another: ClassVar[bool] = True

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """`[CLS] A [SEP] B [SEP]`, with B from another document half the time."""
        text = record["text"]
        cut = place_to_cut(len(text), record["breaks"], rng)
        second, elsewhere = text[cut:], int(rng.integers(2))
        if elsewhere:
            second = _stretch(record["other"], record["other_breaks"], len(second), rng)
        return self.pair(text[:cut], second, {"next_sentence_label": elsewhere}, rng)


def _stretch(other: IntArray, breaks: IntArray, most: int, rng: np.random.Generator) -> IntArray:
    """At most `most` tokens of another document, from the beginning of one of its sentences."""
    starts = np.concatenate(([0], breaks[(breaks > 0) & (breaks < len(other))]))
    start = int(starts[rng.integers(len(starts))])
    return other[start : start + most]
