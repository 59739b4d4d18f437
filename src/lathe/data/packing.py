"""Which pieces of which documents share a row.

A row of fixed length that holds one short document is mostly padding, and padding costs what text costs.
Packing lays several pieces into one row; attention and positions stay inside each (`segment_ids`,
`position_ids`), so a packed document learns exactly what it would learn alone (Krell et al. 2021).

Pieces come in the order of the epoch and go into the first of a few open rows that has room (first fit); the
fullest row is closed when none has. Encoder-decoder rows have two capacities, and a piece must fit both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lathe.objectives.base import IntArray

_OPEN_ROWS = 12


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents: piece i is tokens `start[i]:stop[i]` of document `document[i]`."""

    document: IntArray
    start: IntArray
    stop: IntArray

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each piece."""
        return self.stop - self.start

    @property
    def n_documents(self) -> int:
        """How many documents they are of."""
        return len(np.unique(self.document))

    def is_last(self, piece: int) -> bool:
        """Whether its document ends with it. A document's pieces stand together."""
        return piece + 1 == len(self) or bool(self.document[piece] != self.document[piece + 1])


def cut(lengths: IntArray, window: int, least: int) -> Pieces:
    """Documents of these lengths cut into pieces of `window` tokens and a last one of what is left.

    Every token is in one piece, unless its document is shorter than `least`. Where less than `least` is left
    over, the piece before gives the last one enough; `window` is at least twice `least`.
    """
    counts = np.where(lengths < least, 0, -(-lengths // window))
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = lengths[document]
    is_last = number == counts[document] - 1
    # Where the last piece begins: after the full windows, or `least` before the end if that is earlier.
    last_start = np.maximum(np.minimum((counts[document] - 1) * window, length - least), 0)
    start = np.where(is_last, last_start, number * window)
    stop = np.where(is_last, length, np.minimum((number + 1) * window, last_start))
    return Pieces(document, start, stop)


@dataclass(frozen=True)
class Rows:
    """Pieces by row: row i holds pieces `pieces[ends[i - 1]:ends[i]]`."""

    pieces: IntArray
    ends: IntArray

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> IntArray:
        """The numbers of the pieces in row `index`."""
        return self.pieces[(int(self.ends[index - 1]) if index else 0) : int(self.ends[index])]


def pack(order: IntArray, widths: tuple[IntArray, IntArray], capacity: tuple[int, int]) -> Rows:
    """Lay pieces into rows.

    Args:
        order: the pieces' numbers, in the order in which they are laid.
        widths: what each piece takes of a row and of a decoder's row.
        capacity: what a row and a decoder's row hold; no piece is wider.
    """
    first, second = (width.tolist() for width in widths)
    room: list[tuple[int, int]] = []
    open_rows: list[list[int]] = []
    closed: list[list[int]] = []
    for piece in order.tolist():
        a, b = first[piece], second[piece]
        slot = next((i for i, left in enumerate(room) if a <= left[0] and b <= left[1]), None)
        if slot is None:
            if len(room) == _OPEN_ROWS:
                fullest = min(range(len(room)), key=lambda i: room[i][0])
                closed.append(open_rows.pop(fullest))
                room.pop(fullest)
            slot = len(room)
            room.append(capacity)
            open_rows.append([])
        open_rows[slot].append(piece)
        room[slot] = (room[slot][0] - a, room[slot][1] - b)
    closed += open_rows
    ends = np.cumsum([len(row) for row in closed], dtype=np.int64)
    return Rows(np.array([piece for row in closed for piece in row], dtype=np.int64), ends)


def alone(order: IntArray) -> Rows:
    """A row for each piece, for objectives that ask something of a row as a whole."""
    return Rows(order, np.arange(1, len(order) + 1, dtype=np.int64))
