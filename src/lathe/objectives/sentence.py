"""What the two sentence objectives share: one piece of a document as two segments, and a question about them.

"Sentence" means a stretch of text in both papers (BERT §3.1, "an arbitrary span of contiguous text"): a segment
is one or several whole sentences. The piece is cut in two at the end of one of its sentences, each equally
likely. A piece that is one long sentence has no such place and is cut anywhere.

A row has one question, which the first position answers, so these samples do not share rows; `Batches` lays
samples of similar length side by side instead. Both need documents of several sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.objectives.base import IntArray
from lathe.objectives.masked import Masking


@dataclass(frozen=True, kw_only=True)
class SentencePair(Masking):
    """Masked tokens over two segments, and a label about the two."""

    packs: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The text, and where its sentences end."""
        return ("text", "breaks")

    def window(self, length: int) -> int:
        """The row, less `[CLS]` and two `[SEP]`."""
        return length - 3

    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """The piece and its three marks."""
        return lengths + 3, np.zeros_like(lengths)

    def fit(self, architecture: Architecture) -> None:
        """Raise `RequestError` where the model has no sentence head with two labels, or no two token types."""
        super().fit(architecture)
        classifier = architecture.head.classifier
        if classifier is None or classifier.n_labels != 2:
            raise RequestError(
                f"the objective {self.name} asks one of two labels of each row; this model's classifier has "
                f"{'no' if classifier is None else classifier.n_labels} labels; give it a classifier of 2"
            )
        if architecture.embedding.token_types < 2:
            raise RequestError(
                f"the objective {self.name} marks two segments by token type; this model has "
                f"{architecture.embedding.token_types} token types; set token_types=2"
            )


def place_to_cut(length: int, breaks: IntArray, rng: np.random.Generator) -> int:
    """Where a piece of `length` tokens is cut in two: at a sentence's end, or anywhere if none ends inside."""
    inside = breaks[(breaks > 0) & (breaks < length)]
    return int(inside[rng.integers(len(inside))]) if len(inside) else int(rng.integers(1, length))
