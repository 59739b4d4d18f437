"""Batches in a fixed order, from a position that is two numbers.

Each epoch shuffles the pieces of all documents, packs them into rows and cuts the rows into batches; the
rows of one epoch follow those of the one before, so every batch is full. What is drawn depends on
(seed, epoch, piece) alone. Hence the position in the data is (epoch, row): a resumed run, or one on another
number of ranks, continues with exactly the samples that come next, and no two ranks see the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lathe.architecture import Architecture
from lathe.data.batch import Batch, Layout
from lathe.data.corpus import Corpus
from lathe.data.packing import Rows, alone, cut, pack
from lathe.errors import RequestError
from lathe.objectives.base import IntArray, Objective, Sample


class Batches:
    """An endless, resumable iterator over batches of `rows` rows.

    Args:
        length: positions of a row (of the encoder's where there are both stacks).
        target_length: positions of the decoder's row; what the corpus needs on average where left out.
        rows: rows in a batch, on this rank.
        seed: of the order and of what the objective draws.
        shuffle: a new order each epoch; without it, the corpus's own.
        rank, n_ranks: each rank takes its own rows of every batch.

    Raises:
        RequestError: the corpus lacks a field of the objective, or no document is long enough.
    """

    def __init__(
        self,
        corpus: Corpus,
        objective: Objective,
        *,
        length: int,
        rows: int,
        target_length: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        if rows < 1 or not 0 <= rank < n_ranks:
            raise RequestError(
                f"rows={rows}, rank={rank} of {n_ranks}: expected 1 row or more, and a rank below the count"
            )
        for name in objective.reads:
            if name not in corpus.fields:
                raise RequestError(
                    f"the objective {objective.name} reads the field {name!r}; the data has {', '.join(corpus.fields)}"
                )
        self.corpus, self.objective, self.seed, self.shuffle = corpus, objective, seed, shuffle
        self.n_rows, self.rank, self.n_ranks = rows, rank, n_ranks
        self._text = corpus.fields[objective.reads[0]]
        window = objective.window(length)
        if window < 2 * objective.least:
            raise RequestError(f"length={length}: too short for the objective {objective.name}; give more positions")
        self.pieces = cut(self._text.lengths, window, objective.least)
        if not len(self.pieces):
            raise RequestError(
                f"no document has the {objective.least} tokens that the objective {objective.name} needs; "
                "give longer documents"
            )
        self.widths = objective.widths(self.pieces.lengths)
        self.two_sided = bool(self.widths[1].any())
        self.length = length
        self.target_length = self._target_length(target_length)
        self._layout = Layout(objective.special, self.two_sided, self.length, self.target_length)
        self.epoch, self.row = 0, 0
        self._packed: tuple[int, Rows] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch of this rank; the position moves by what all ranks take."""
        name = f"epoch {self.epoch}, row {self.row}"
        picked: list[list[Sample]] = []
        for i in range(self.n_rows * self.n_ranks):
            if self.row >= len(self._rows()):
                self.epoch, self.row = self.epoch + 1, 0
            if i // self.n_rows == self.rank:
                picked.append(self._samples(self.row))
            self.row += 1
        return self._layout.batch(picked, name)

    def one_pass(self, limit: int | None = None) -> list[Batch]:
        """The first `limit` batches of epoch 0 (all of them where left out), the last one as short as it is.

        This is a fixed set, for evaluation; the position stays where it is.
        """
        fixed = Batches(
            self.corpus,
            self.objective,
            length=self.length,
            target_length=self.target_length if self.two_sided else None,
            rows=self.n_rows,
            seed=self.seed,
            shuffle=False,
        )
        starts = range(0, len(fixed._rows()), self.n_rows)[:limit]
        return [
            fixed._layout.batch(
                [fixed._samples(row) for row in range(start, min(start + self.n_rows, len(fixed._rows())))],
                f"evaluation, row {start}",
            )
            for start in starts
        ]

    def fit(self, architecture: Architecture) -> None:
        """Raise `RequestError` where a model of this architecture cannot be trained on these batches."""
        self.objective.fit(architecture)
        rows = {"encoder": self.length, "decoder": self.target_length if self.two_sided else self.length}
        widest = {"encoder": self.widths[0], "decoder": self.widths[1] if self.two_sided else self.widths[0]}
        for name, stack in architecture.stacks:
            limit, longest = stack.positions.limit, int(widest[name].max())
            if limit is not None and longest > limit:
                raise RequestError(
                    f"a sample takes {longest} positions of the {name} and it has {limit}; "
                    f"give rows of at most {limit} positions instead of {rows[name]}"
                )

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "row": self.row, "data": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. `RequestError` where it was saved over other data or other settings."""
        mine, given = self._fingerprint(), state["data"]
        different = [key for key in mine if mine[key] != given.get(key)]
        if different:
            key = different[0]
            raise RequestError(
                f"the saved position is in other data: {key} was {given.get(key)!r} and is {mine[key]!r}; "
                "resume with the same data and objective, or start a new run"
            )
        self.epoch, self.row = int(state["epoch"]), int(state["row"])

    def _fingerprint(self) -> dict[str, Any]:
        settings = json.dumps(self.objective.to_dict(), sort_keys=True).encode()
        return {
            "documents": self.corpus.digest(),
            "objective": f"{self.objective.name} {hashlib.sha256(settings).hexdigest()[:16]}",
            "length": self.length,
            "target_length": self.target_length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _target_length(self, given: int | None) -> int:
        if not self.two_sided:
            if given is not None:
                raise RequestError(f"target_length={given}: the objective {self.objective.name} has no decoder's row")
            return 0
        widest = int(self.widths[1].max())
        if given is not None:
            if given < widest:
                raise RequestError(f"target_length={given}: a sample takes {widest} positions; expected that or more")
            return given
        # As much as a full row of the encoder brings along on average, and a little more for the unevenness.
        share = float(self.widths[1].sum()) / float(self.widths[0].sum())
        return max(widest, -(-int(self.length * share * 1.05) // 8) * 8)

    def _rows(self) -> Rows:
        if self._packed is None or self._packed[0] != self.epoch:
            order: IntArray = np.arange(len(self.pieces), dtype=np.int64)
            if self.shuffle:
                order = np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(order)
            capacity = (self.length, self.target_length)
            packed = pack(order, self.widths, capacity) if self.objective.packs else alone(order)
            self._packed = (self.epoch, packed)
        return self._packed[1]

    def _samples(self, row: int) -> list[Sample]:
        return [self._sample(int(piece)) for piece in self._rows().row(row)]

    def _sample(self, piece: int) -> Sample:
        document = int(self.pieces.document[piece])
        record = {name: self.corpus.fields[name].row(document) for name in self.objective.reads}
        if len(record) == 1:
            name = self.objective.reads[0]
            record[name] = record[name][int(self.pieces.start[piece]) : int(self.pieces.stop[piece])]
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, piece]))
        return self.objective.sample(record, rng)
