"""Tokenised documents: one flat array of token ids a field, and where each document ends.

A million short documents as a million arrays cost more in headers than in tokens. Here a field is one array
of the smallest unsigned type that holds the vocabulary, which may be a memory map, and a table of ends.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lathe.errors import RequestError
from lathe.objectives.base import IntArray


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one array; row i is `flat[ends[i - 1]:ends[i]]`."""

    flat: NDArray[Any]
    ends: IntArray

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row."""
        return np.diff(self.ends, prepend=0)

    def row(self, index: int) -> IntArray:
        """A copy of row `index`."""
        start = int(self.ends[index - 1]) if index else 0
        return self.flat[start : int(self.ends[index])].astype(np.int64)

    def part(self, index: int, start: int, stop: int) -> IntArray:
        """A copy of `start:stop` of row `index`, without reading the rest of it; `stop` is within the row."""
        first = int(self.ends[index - 1]) if index else 0
        return self.flat[first + start : first + stop].astype(np.int64)

    @classmethod
    def of(cls, rows: Iterable[ArrayLike], vocab_size: int) -> Ragged:
        """Rows gathered from lists or arrays of ids, each of which must be below `vocab_size`."""
        kept = [np.asarray(row, dtype=np.int64) for row in rows]
        ends = np.cumsum([len(row) for row in kept], dtype=np.int64)
        flat = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)
        if len(flat) and not (int(flat.min()) >= 0 and int(flat.max()) < vocab_size):
            outside = flat[(flat < 0) | (flat >= vocab_size)][0]
            raise RequestError(
                f"token id {int(outside)} is outside the vocabulary of {vocab_size:,}; "
                "does the tokenizer belong to this model?"
            )
        return cls(flat.astype(np.uint16 if vocab_size <= 2**16 else np.uint32), ends)


class Corpus:
    """Documents as token ids. A field is `text`, `text` and `pair`, or `source` and `target`.

    Args:
        fields: name to rows; every field has as many rows.
        breaks: for each `text`, the places (in tokens, from its beginning) at which its sentences end.
        labels: a class number for each document.
    """

    def __init__(
        self, fields: Mapping[str, Ragged], *, breaks: Ragged | None = None, labels: IntArray | None = None
    ) -> None:
        columns: dict[str, Ragged | IntArray] = dict(fields)
        if breaks is not None:
            columns["breaks"] = breaks
        if labels is not None:
            columns["label"] = labels
        counts = {name: len(rows) for name, rows in columns.items()}
        if len(set(counts.values())) > 1:
            raise RequestError(f"the fields of a corpus have different numbers of documents: {counts}")
        self.fields, self.breaks, self.labels = dict(fields), breaks, labels
        self.names = tuple(columns)
        self._n = next(iter(counts.values()), 0)
        if not self._n:
            raise RequestError("the data holds no document; give a file that holds some")

    @classmethod
    def of(
        cls,
        vocab_size: int,
        *,
        breaks: Iterable[ArrayLike] | None = None,
        labels: ArrayLike | None = None,
        **fields: Iterable[ArrayLike],
    ) -> Corpus:
        """A corpus in memory: `Corpus.of(100, text=[[5, 6], [7]])`."""
        return cls(
            {name: Ragged.of(rows, vocab_size) for name, rows in fields.items()},
            breaks=None if breaks is None else Ragged.of(breaks, 2**32),
            labels=None if labels is None else np.asarray(labels, dtype=np.int64),
        )

    def __len__(self) -> int:
        return self._n

    @property
    def n_tokens(self) -> int:
        """Tokens of all fields together."""
        return sum(len(rows.flat) for rows in self.fields.values())

    def piece(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray | None]:
        """Tokens `start` to `stop` of a document's `text`, and the breaks inside them, counted from `start`."""
        text = self.fields["text"].part(document, start, stop)
        if self.breaks is None:
            return text, None
        breaks = self.breaks.row(document) - start
        return text, breaks[(breaks > 0) & (breaks < len(text))]

    def digest(self) -> str:
        """A name of the contents: equal for equal documents in equal order. Computed once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        columns = self.fields if self.breaks is None else {**self.fields, "breaks": self.breaks}
        for name in sorted(columns):
            rows = columns[name]
            digest.update(f"{name}:{len(rows)}:{rows.flat.dtype.str}:".encode())
            digest.update(np.ascontiguousarray(rows.ends).data)
            digest.update(np.ascontiguousarray(rows.flat).data)
        if self.labels is not None:
            digest.update(b"label:")
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()[:16]
