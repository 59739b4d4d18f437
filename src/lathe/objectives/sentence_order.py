"""Masked tokens and the order of two segments (ALBERT §3.1, "Inter-sentence coherence loss").

Two consecutive segments of one document are shown, exchanged half the time, and the model says whether they
were. Next-sentence prediction can be solved by topic alone, since its wrong answers come from other documents;
here both answers have the same topic, and only the order tells them apart.

`sentence_order_label` is 0 for the document's own order and 1 for the other one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.objectives.base import Record, Sample
from lathe.objectives.sentence import SentencePair, place_to_cut


@dataclass(frozen=True, kw_only=True)
class SentenceOrder(SentencePair):
    """ALBERT's pretraining: masked tokens, and whether two segments were exchanged."""

    name: ClassVar[str] = "sentence_order"

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """`[CLS] A [SEP] B [SEP]`, or B before A half the time."""
        text = record["text"]
        cut = place_to_cut(len(text), record["breaks"], rng)
        exchanged = int(rng.integers(2))
        first, second = (text[cut:], text[:cut]) if exchanged else (text[:cut], text[cut:])
        return self.pair(first, second, {"sentence_order_label": exchanged}, rng)
