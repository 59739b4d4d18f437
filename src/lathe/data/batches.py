"""Batches in a fixed order, from a position that is two numbers.

Each epoch shuffles the pieces of all documents, packs them into rows and cuts the rows into batches; the
rows of one epoch follow those of the one before, so every batch is full. What is drawn depends on
(seed, epoch, piece) alone. Hence the position in the data is (epoch, row): a resumed run, or one on another
number of ranks, continues with exactly the samples that come next, and no two ranks see the same one.

Samples that may not share a row are put into buckets of similar length instead (`lathe.data.bucket`). Their order
then depends on how many rows a batch has, and a position is good for that number.

A batch's rows are divided among the ranks as evenly as they go. How many ranks there are changes who reads a row,
and nothing about which rows make a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lathe.architecture import Architecture
from lathe.data.batch import Batch, Layout
from lathe.data.bucket import buckets
from lathe.data.corpus import Corpus
from lathe.data.packing import Pieces, Rows, alone, cut, pack
from lathe.errors import RequestError
from lathe.objectives.base import LAST, IntArray, Objective, RecordObjective, Sample, TextObjective


class Batches:
    """An endless, resumable iterator over batches of `rows` rows.

    Args:
        length: positions of a row (of the encoder's where there are both stacks).
        target_length: positions of the decoder's row; what the corpus needs on average where left out.
        rows: rows in a batch, on all ranks together.
        seed: of the order and of what the objective draws.
        shuffle: a new order each epoch; without it, the corpus's own.
        rank, n_ranks: each rank takes its own rows of every batch.

    Raises:
        RequestError: the corpus lacks a field of the objective, no document is long enough, a record is too
            long for a row, or a label is out of range.
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
        if not 0 <= rank < n_ranks:
            raise RequestError(f"rank={rank} of {n_ranks}: expected a rank below the count")
        if rows < n_ranks:
            raise RequestError(
                f"rows={rows} in a batch for {n_ranks} {'rank' if n_ranks == 1 else 'ranks'}: "
                "expected one row for each, or more; give more rows"
            )
        _check_fields(corpus, objective)
        self.corpus, self.objective, self.seed, self.shuffle = corpus, objective, seed, shuffle
        self.n_rows, self.rank, self.n_ranks = rows, rank, n_ranks
        self.pieces, self.widths = _pieces(corpus, objective, length)
        self.two_sided = bool(self.widths[1].any())
        self.length = length
        self.target_length = self._target_length(target_length)
        packed = objective.packs
        self._layout = Layout(objective.special, self.two_sided, self.length, self.target_length, packed)
        self.epoch, self.row = 0, 0
        self._packed: tuple[int, Rows] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """This rank's rows of the next batch; the position moves by what all ranks take."""
        name = f"epoch {self.epoch}, row {self.row}"
        picked: list[list[Sample]] = []
        first, last = (self.n_rows * rank // self.n_ranks for rank in (self.rank, self.rank + 1))
        for i in range(self.n_rows):
            if self.row >= len(self._rows()):
                self.epoch, self.row = self.epoch + 1, 0
            if first <= i < last:
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
            # The order of what is packed does not depend on the batch.
            "rows": None if self.objective.packs else self.n_rows,
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
            self._packed = (self.epoch, self._laid(order))
        return self._packed[1]

    def _samples(self, row: int) -> list[Sample]:
        return [self._sample(int(piece)) for piece in self._rows().row(row)]

    def _laid(self, order: IntArray) -> Rows:
        """The pieces of an epoch in rows."""
        if self.objective.packs:
            return pack(order, self.widths, (self.length, self.target_length))
        if not self.shuffle:
            return alone(order)
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, 0, 2]))
        return buckets(order, self.widths[0], self.n_rows, self.epoch, rng)

    def _sample(self, piece: int) -> Sample:
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, piece]))
        if not isinstance(self.objective, TextObjective):
            return self.objective.sample(self._record(piece), rng)
        record = self._stretch(piece)
        if self.objective.another:
            # A number after the piece's, so that this draw and the objective's have nothing in common.
            chosen = np.random.Generator(np.random.PCG64([self.seed, self.epoch, piece, 1]))
            other = self._stretch(self._elsewhere(piece, chosen))
            record |= {"other": other["text"], "other_breaks": other["breaks"]}
        return self.objective.sample(record, rng)

    def _record(self, document: int) -> dict[str, IntArray]:
        """A whole record; its class is an array of one."""
        record = {name: self.corpus.fields[name].row(document) for name in self.objective.reads if name != "label"}
        if "label" in self.objective.reads:
            assert self.corpus.labels is not None
            record["label"] = self.corpus.labels[document : document + 1]
        return record

    def _stretch(self, piece: int) -> dict[str, IntArray]:
        """A piece of a document, and where sentences end in it, if the objective asks."""
        where = (int(each[piece]) for each in (self.pieces.document, self.pieces.start, self.pieces.stop))
        text, breaks = self.corpus.piece(*where)
        record = {"text": text, LAST: np.array([self.pieces.is_last(piece)], dtype=np.int64)}
        if "breaks" not in self.objective.reads:
            return record
        assert breaks is not None
        return {**record, "breaks": breaks}

    def _elsewhere(self, piece: int, rng: np.random.Generator) -> int:
        """A piece of another document, each equally likely. A document's pieces stand together."""
        documents = self.pieces.document
        first, last = (
            np.searchsorted(documents, documents[piece]),
            np.searchsorted(documents, documents[piece], "right"),
        )
        drawn = int(rng.integers(len(documents) - int(last - first)))
        return drawn if drawn < first else drawn + int(last - first)


def _check_fields(corpus: Corpus, objective: Objective) -> None:
    for name in objective.reads:
        if name not in corpus.names:
            hint = "; tokenise it with breaks, to know where sentences end" if name == "breaks" else ""
            raise RequestError(
                f"the objective {objective.name} reads the field {name!r}; the data has {', '.join(corpus.names)}{hint}"
            )


def _pieces(corpus: Corpus, objective: Objective, length: int) -> tuple[Pieces, tuple[IntArray, IntArray]]:
    """What the samples are made of, and the positions that each takes."""
    if isinstance(objective, TextObjective):
        return _cut_pieces(corpus, objective, length)
    assert isinstance(objective, RecordObjective)
    if "label" in objective.reads:
        assert corpus.labels is not None
        objective.check_labels(corpus.labels)
    lengths = {name: corpus.fields[name].lengths for name in objective.reads if name != "label"}
    widths = objective.record_widths(lengths)
    too_long = np.flatnonzero(widths[0] > length)
    if len(too_long):
        number = int(too_long[0])
        raise RequestError(
            f"record {number + 1} takes {int(widths[0][number])} positions and a row has {length}; "
            f"give longer rows, or shorten what is longer (see the objective {objective.name})"
        )
    first = lengths[objective.reads[0]]
    return Pieces(np.arange(len(corpus), dtype=np.int64), np.zeros_like(first), first), widths


def _cut_pieces(corpus: Corpus, objective: TextObjective, length: int) -> tuple[Pieces, tuple[IntArray, IntArray]]:
    window = objective.window(length)
    if window < 2 * objective.least:
        raise RequestError(f"length={length}: too short for the objective {objective.name}; give more positions")
    pieces = cut(corpus.fields["text"].lengths, window, objective.least)
    if not len(pieces):
        raise RequestError(
            f"no document has the {objective.least} tokens that the objective {objective.name} needs; "
            "give longer documents"
        )
    if objective.another and pieces.document[0] == pieces.document[-1]:
        raise RequestError(
            f"the objective {objective.name} takes text from other documents and the data has one; "
            "give several documents"
        )
    return pieces, objective.widths(pieces.lengths)
