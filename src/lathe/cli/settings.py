"""`field=value` words become a dictionary of fields.

A word sets one field of an architecture: `d_model=512`, `encoder.n_layers=4`, `tied=false`,
`d_embed=none`, `sharing=groups:3`. Only the spelling is judged here, because it looks the same for
every field; which fields exist and which values they take is the architecture's to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from lathe.errors import RequestError

Setting = int | float | bool | str | list[str] | None

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_PADDED = re.compile(r"[+-]?0[0-9]+")  # 007 is a name
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None, "null": None}
# The longest run of digits that is read as a number; no size or rate is longer.
_MAX_DIGITS = 40


def parse_settings(words: Iterable[str]) -> dict[str, Setting]:
    """Read `field=value` words into a dictionary, in the order given.

    A value that is written as an integer, a decimal, true, false or none becomes that, and `[a,b]` a list of words;
    anything else stays text. RequestError for a word without `=`, a field that is no dotted name, an empty value,
    a number too long or too large to hold, or a field that is set twice.
    """
    settings: dict[str, Setting] = {}
    for word in words:
        field, equals, value = word.partition("=")
        if not equals:
            raise RequestError(f"{word!r} sets nothing; write field=value without spaces, as in d_model=512")
        if not _FIELD.fullmatch(field):
            raise RequestError(f"{word!r}: {field!r} is not a field name; write field=value, as in encoder.n_layers=4")
        if not value:
            raise RequestError(f"{word!r} has no value; write {field}=VALUE, or {field}=none for no value")
        if field in settings:
            raise RequestError(f"{field} is set twice, the second time by {word!r}; set it once")
        settings[field] = _parse_value(field, value)
    return settings


def _parse_value(field: str, text: str) -> Setting:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.startswith("[") and text.endswith("]"):
        return [word.strip() for word in text[1:-1].split(",")]
    if not _DECIMAL.fullmatch(text) or _PADDED.fullmatch(text):
        return text
    if len(text) > _MAX_DIGITS:
        raise RequestError(
            f"{field} is a number of {len(text)} characters; at most {_MAX_DIGITS} are read, write it shorter"
        )
    if _INTEGER.fullmatch(text):
        return int(text)
    number = float(text)
    if math.isinf(number):
        raise RequestError(f"{field}={text} is too large for a number; give a smaller one")
    return number
