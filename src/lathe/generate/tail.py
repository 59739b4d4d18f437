"""The end of a row of ids, spelled without what stands far before it.

A text is searched and shown while it is written, token by token, and to spell all of it again each time would take time
that grows with its square. The last few ids spell the same as they do at the end of the whole row, with one exception:
pieces that stand for single bytes (`<0x0A>`, where a SentencePiece vocabulary lacks a character). A row of them is
spelled as one, and as nothing but U+FFFD where it begins or ends in the middle of a character. So none is cut in two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lathe.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CHARACTER = 4  # bytes that one takes at most, in UTF-8


def last_ids(tokenizer: Tokenizer, ids: Sequence[int], least: int, *, skip: bool) -> list[int]:
    """The last `least` ids, and before them those of a row of bytes that began earlier.

    Args:
        skip: whether special tokens are left out of the text: then they do not end a row of bytes, and those after
            one are spelled together with those before it.
    """
    start = max(0, len(ids) - least)
    while start and _joins(tokenizer, ids[start], skip=skip):
        start -= 1
    return list(ids[start:])


def settled(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool) -> list[int]:
    """The ids without the row of bytes at their end, whose text is known only when another kind of token follows."""
    known = len(ids)
    while known and _joins(tokenizer, ids[known - 1], skip=skip):
        known -= 1
    return list(ids[:known])


def whole_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What the ids spell, special tokens too, up to a character that bytes at their end begin and do not end."""
    for unfinished in range(min(_CHARACTER, len(ids))):
        text = tokenizer.decode(ids[: len(ids) - unfinished], False, errors="replace")
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or not is_byte(tokenizer, ids[len(ids) - unfinished - 1]):
            return text
    return tokenizer.decode(ids, False, errors="replace")


def is_byte(tokenizer: Tokenizer, number: int) -> bool:
    """Whether an id is a piece that stands for a single byte."""
    # The model's table may have more rows than the vocabulary has tokens.
    return number < tokenizer.vocab_size and _BYTE.fullmatch(tokenizer.pieces([number])[0]) is not None


def _joins(tokenizer: Tokenizer, number: int, *, skip: bool) -> bool:
    return is_byte(tokenizer, number) or (skip and number in tokenizer.special_ids)
