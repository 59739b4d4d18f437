"""A text cut into the segments that sentence objectives exchange: lines, paragraphs or sentences.

The segments put together are the text, but for the white space between them. A sentence ends at `.`, `!`, `?`, `…`
or their full-width forms, with closing quotes and brackets, before white space; also at the end of a line. That
takes `e.g. this` for two, which for these objectives does no harm: they need places where text pauses.
"""

from __future__ import annotations

import re

from lathe.errors import RequestError
from lathe.spec import unknown

_ENDS = {
    "line": re.compile(r"\s*\n\s*"),
    "paragraph": re.compile(r"\s*\n[^\S\n]*\n\s*"),
    "sentence": re.compile(r"(?<=[.!?…。！？])\s+|(?<=[.!?…。！？][\"'”’)\]」』])\s+|\s*\n\s*"),
}
KINDS = tuple(_ENDS)


def check_kind(kind: str) -> None:
    """Raise `RequestError` for a kind of segment that does not exist."""
    if kind not in _ENDS:
        raise RequestError(unknown("kind of segment", kind, KINDS))


def segment_spans(text: str, kind: str) -> list[tuple[int, int]]:
    """From where to where in `text` its segments are: `segment_spans("One. Two!", "sentence")` is `[(0, 4), (5, 9)]`.

    None is empty. White space before a segment may be counted in, and none after it.
    """
    check_kind(kind)
    borders = [0, *(place for end in _ENDS[kind].finditer(text) for place in end.span()), len(text)]
    spans = ((start, start + len(text[start:stop].rstrip())) for start, stop in zip(borders[::2], borders[1::2]))
    return [(start, stop) for start, stop in spans if stop > start]
