"""What a tokenizer's pieces and marks say: which pieces go on with a word, and what stands around a text.

Both are read off the tokenizer itself, by its vocabulary and by what it makes of a probe.
"""

from __future__ import annotations

import string

from lathe.text.conventions import SPACE
from lathe.text.readable import readable_pieces
from lathe.text.tokenizer import Tokenizer
from lathe.text.wordpiece import CONTINUES

_PROBE = "a"
_SPACE_BYTE = "<0x20>"


def continuing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of pieces that go on with the word of the piece before.

    WordPiece writes these with `##`. The others mark a word's beginning instead, as a space; there a piece
    without the mark goes on, unless it begins with punctuation, which is a word of its own.
    """
    ids = sorted(set(tokenizer.vocabulary.values()) - tokenizer.special_ids)
    pieces = readable_pieces(tokenizer, ids)
    if any(piece.startswith(CONTINUES) and piece != CONTINUES for piece in pieces) and not any(
        piece.startswith(SPACE) for piece in pieces
    ):
        return tuple(number for number, piece in zip(ids, pieces) if piece.startswith(CONTINUES))
    return tuple(number for number, piece in zip(ids, pieces) if _goes_on(piece))


def _goes_on(piece: str) -> bool:
    if piece.startswith("<0x"):  # a byte of a character that has no piece
        return not piece.startswith(_SPACE_BYTE)
    return bool(piece) and not piece.startswith((SPACE, *string.punctuation))


Marks = tuple[int, ...]


def frame(tokenizer: Tokenizer) -> tuple[Marks, Marks, Marks] | None:
    """What the tokenizer sets before a text, between the two texts of a pair, and after the last.

    None where it does something else with a pair, which three marks do not describe.
    """
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    alone, pair = tokenizer.encode(_PROBE), tokenizer.encode(_PROBE, _PROBE)
    places = [i for i in range(len(pair) - len(probe) + 1) if pair[i : i + len(probe)] == probe]
    if not probe or len(places) < 2:
        return None
    first, second = places[0], places[-1]
    front, middle, back = pair[:first], pair[first + len(probe) : second], pair[second + len(probe) :]
    return (tuple(front), tuple(middle), tuple(back)) if alone == front + probe + back else None
