"""Pieces as a person reads them.

A vocabulary writes its pieces for machines. Byte-level BPE has one character for each byte, so that `안` stands
there as `ìķĪ`; a piece may hold a line break. Here a piece is shown as the text that it is, a space as `▁`, bytes
that make no whole character as `<0xEC>`, and what cannot be printed as Python would escape it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lathe.text.conventions import SPACE
from lathe.text.tokenizer import Tokenizer


def readable_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The piece of each id, to be shown.

    Raises:
        RequestError: an id outside the vocabulary.
    """
    pieces = tokenizer.pieces(ids)
    if tokenizer.spells_bytes:
        special = tokenizer.special_ids
        pieces = [piece if number in special else _spelt(piece) for number, piece in zip(ids, pieces, strict=True)]
    return [_printable(piece) for piece in pieces]


def _spelt(piece: str) -> str:
    table = _bytes_of_characters()
    if not all(character in table for character in piece):
        return piece  # a token that was added as text
    data = bytes(table[character] for character in piece)
    try:
        return data.decode("utf-8").replace(" ", SPACE)
    except UnicodeDecodeError:
        return "".join(chr(byte) if 0x20 < byte < 0x7F else f"<0x{byte:02X}>" for byte in data)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (Radford et al. 2019's table).

    A byte that Latin-1 can print is that character; the others are numbered from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _printable(piece: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in piece
    )
