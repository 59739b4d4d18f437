"""Classification of texts and of pairs of texts (BERT §4.1): one label for each row.

The row is what the tokenizer makes of a text or a pair (`[CLS] a [SEP] b [SEP]`, `<s> a </s></s> b </s>`,
`a b`): a classifier meets the same rows wherever it is used later. The label is a class number, 0 to
`n_labels` − 1. Any model with a classifier serves: an encoder, a decoder that reads its last token, or both.

`max_length` shortens what is longer and counts the marks: of a pair, the longer text gives way first. Without
it nothing is shortened, and a text too long for a row is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.objectives.base import IntArray, Record, RecordObjective, Sample
from lathe.spec import size
from lathe.text.batch import share


@dataclass(frozen=True, kw_only=True)
class Classification(RecordObjective):
    """One of `n_labels` classes for each text, or for each pair of texts where `pairs` is set."""

    n_labels: int = size(2**20, least=2)
    pairs: bool = False
    max_length: int | None = size(2**20, least=8, default=None)

    stacks: ClassVar[tuple[str, ...]] = ()  # whichever the model has
    packs: ClassVar[bool] = False
    name: ClassVar[str] = "classification"

    @property
    def reads(self) -> tuple[str, ...]:
        """The texts and the label."""
        return ("text", "pair", "label") if self.pairs else ("text", "label")

    def check(self) -> None:
        if None in (self.special.front, self.special.middle, self.special.back):
            raise RequestError(
                "the objective classification needs to know what the tokenizer sets around texts and between pairs, "
                "and this one follows no such rule; use another tokenizer"
            )

    @property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The marks before, between and after."""
        front, middle, back = self.special.front, self.special.middle, self.special.back
        assert front is not None
        assert middle is not None
        assert back is not None
        return front, middle if self.pairs else (), back

    @property
    def _marks(self) -> int:
        return sum(len(each) for each in self._around)

    def record_widths(self, lengths: Mapping[str, IntArray]) -> tuple[IntArray, IntArray]:
        """The texts and their marks, after shortening."""
        taken = lengths["text"] + (lengths["pair"] if self.pairs else 0) + self._marks
        if not taken.all():
            number = int(np.flatnonzero(taken == 0)[0])
            raise RequestError(f"record {number + 1}: the text is empty; leave such records out")
        return np.minimum(taken, self.max_length or np.iinfo(np.int64).max), np.zeros_like(taken)

    def check_labels(self, labels: IntArray) -> None:
        """Raise `RequestError` for the first label that is no class."""
        wrong = np.flatnonzero((labels < 0) | (labels >= self.n_labels))
        if len(wrong):
            number = int(wrong[0])
            raise RequestError(
                f"record {number + 1}: label {int(labels[number])} is out of range; "
                f"expected 0 to {self.n_labels - 1}; correct it, or give more n_labels"
            )

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """Nothing is drawn: the row and its class."""
        first, second = record["text"], record["pair"] if self.pairs else np.zeros(0, np.int64)
        if self.max_length is not None:
            keep = share(self.max_length - self._marks, len(first), len(second))
            first, second = first[: keep[0]], second[: keep[1]]
        front, middle, back = (np.array(marks, np.int64) for marks in self._around)
        ids = np.concatenate((front, first, middle, second, back))
        types: IntArray | None = None
        if self.special.token_types:
            types = np.zeros_like(ids)
            if self.pairs:
                types[len(front) + len(first) + len(middle) :] = 1
        return Sample(ids, np.zeros(0, np.int64), types, {"labels": int(record["label"][0])})

    def fit(self, architecture: Architecture) -> None:
        """Raise `RequestError` where the model's classifier is another one than these labels need."""
        head = architecture.head
        if head.classifier is None or head.language is not None:
            raise RequestError(
                "the objective classification labels whole texts; this model has no classifier of its own; "
                "give it one in place of the language head"
            )
        if head.classifier.n_labels != self.n_labels:
            raise RequestError(
                f"the data has {self.n_labels} labels and the model's classifier {head.classifier.n_labels}; "
                f"set n_labels={self.n_labels}"
            )
        self.fit_vocabulary(architecture)
