"""Frozen, typed, nested records that read and write JSON and refuse what they do not know.

`Spec` is what `Architecture` and its parts are made of. It is a plain frozen dataclass with three
additions: every value is checked against its annotation when the record is made, `from_dict` refuses
unknown keys and says what it expected, and a record that has a short written form (`Sharing`) reads
and writes that form. Dataclasses instead of a validation library keep the planner's start-up under
half a second and the messages at one line (docs/decisions/0001-plain-dataclasses.md).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Self, cast

from lathe.errors import RequestError


def size(limit: int = 2**20, *, least: int = 1, default: Any = dataclasses.MISSING) -> Any:
    """A field that holds a whole number from `least` to `limit`."""
    return dataclasses.field(default=default, metadata={"range": (least, limit)})


def choice(*values: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that holds one of `values`."""
    return dataclasses.field(default=default, metadata={"choices": values})


def share(default: float = 0.0) -> Any:
    """A field that holds a probability, 0 ≤ p < 1."""
    return dataclasses.field(default=default, metadata={"share": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A frozen record whose values are checked against their annotations."""

    def __post_init__(self) -> None:
        for name, (field, hint) in _fields(type(self)).items():
            value = getattr(self, name)
            checked = _coerce(value, hint, name)
            _check_range(checked, field, name)
            if checked is not value:
                object.__setattr__(self, name, checked)
        self.check()

    def check(self) -> None:
        """Raise `RequestError` where the values contradict each other."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Build the record from plain JSON values; an unknown key is an error that names it.

        Args:
            values: field name to value; nested records as nested mappings.
            path: where this record stands in the whole, for the error's sake.
        """
        if not isinstance(values, Mapping):
            raise RequestError(
                f"{path or cls.__name__}={values!r}: expected fields of {cls.__name__}, not a bare value"
            )
        fields = _fields(cls)
        for key in values:
            if key not in fields:
                raise RequestError(unknown("field", f"{path}.{key}" if path else str(key), fields))
        missing = [name for name, (field, _) in fields.items() if _is_required(field) and name not in values]
        if missing:
            raise RequestError(f"{path or cls.__name__}: the field {missing[0]!r} is missing; give it a value")
        built = {key: _build(value, fields[key][1], f"{path}.{key}" if path else key) for key, value in values.items()}
        try:
            return cls(**built)
        except RequestError as error:
            raise RequestError(f"{path}.{error}" if path else str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values; `from_dict` reads it back to an equal record."""
        return {name: plain(getattr(self, name)) for name in _fields(type(self))}

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the record's fields, in order."""
        return list(_fields(cls))


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """The one line for a name that does not exist: what was given, what was expected, the likely slip."""
    names = list(known)
    close = difflib.get_close_matches(given.rsplit(".", 1)[-1], names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {given!r}: expected one of {', '.join(names)}{hint}"


def _fields(cls: type[Spec]) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    return _fields_of(cast("Hashable", cls))


@functools.cache
def _fields_of(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _spec_in(hint: Any) -> type[Spec] | None:
    for each in _alternatives(hint):
        if isinstance(each, type) and issubclass(each, Spec):
            return each
    return None


def _build(value: Any, hint: Any, path: str) -> Any:
    spec = _spec_in(hint)
    if spec is None or isinstance(value, Spec) or (value is None and type(None) in _alternatives(hint)):
        return value
    parse = getattr(spec, "parse", None)
    if parse is not None and (value is None or isinstance(value, str)):
        return parse("none" if value is None else value)  # a command line's `none` is nothing, and here a pattern
    return spec.from_dict(value, path)


def plain(value: Any) -> Any:
    """A field's value as JSON has it: a record as its written form or as a dictionary."""
    if isinstance(value, Spec):
        return str(value) if hasattr(value, "parse") else value.to_dict()
    return list(value) if isinstance(value, tuple) else _as_python(value)


_DIGITS = re.compile(r"[+-]?[0-9]{1,40}")
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    type(None): "none",
}


def _as_python(value: Any) -> Any:
    """A number of another library, as NumPy's, as Python's own; anything else as it is."""
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """The value as its annotation wants it, or the line that says what was expected."""
    options, value = _alternatives(hint), _as_python(value)
    for option in options:
        if typing.get_origin(option) is tuple:
            held = _tuple_of(value, option)
            if held is not None:
                return held
        elif option is float:
            if type(value) in (int, float) and _is_finite(value):
                return float(value)
        elif type(value) is option or (
            isinstance(option, type) and issubclass(option, Spec) and isinstance(value, option)
        ):
            return value
    parse = getattr(_spec_in(hint), "parse", None)
    if parse is not None and isinstance(value, str):
        return parse(value)
    raise RequestError(f"{name}={value!r}: expected {' or '.join(_expected(each) for each in options)}")


def _tuple_of(value: Any, hint: Any) -> tuple[Any, ...] | None:
    """A list as the tuple that `hint` asks for, of numbers, words or further lists; None where it is none."""
    inner = typing.get_args(hint)[0]
    if not isinstance(value, (list, tuple)):
        return None
    if typing.get_origin(inner) is not tuple:
        if inner is int and all(isinstance(each, str) and _DIGITS.fullmatch(each) for each in value):
            value = [int(each) for each in value]  # a command line's list is one of words
        return tuple(value) if all(type(each) is inner for each in value) else None
    parts = [_tuple_of(each, inner) for each in value]
    return None if None in parts else tuple(parts)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list, each of it {_expected(typing.get_args(hint)[0])}"
    return _EXPECTED.get(hint, getattr(hint, "__name__", str(hint)))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _check_range(value: Any, field: dataclasses.Field[Any], name: str) -> None:
    if value is None:
        return
    if "range" in field.metadata:
        least, limit = field.metadata["range"]
        if not least <= value <= limit:
            raise RequestError(f"{name}={value}: expected a whole number from {least:,} to {limit:,}")
    if "choices" in field.metadata and value not in field.metadata["choices"]:
        raise RequestError(f"{name}={value!r}: expected one of {', '.join(field.metadata['choices'])}")
    if "share" in field.metadata and not 0.0 <= value < 1.0:
        raise RequestError(f"{name}={value}: expected a probability, 0 or more and below 1")
