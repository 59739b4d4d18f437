from __future__ import annotations

from dataclasses import dataclass

import numpy
import pytest

from lathe.errors import RequestError
from lathe.spec import Spec, choice, plain, share, size, unknown


@dataclass(frozen=True, kw_only=True)
class Inner(Spec):
    rank: int = size(16)
    name: str = "x"


@dataclass(frozen=True, kw_only=True)
class Word(Spec):
    """Written as its own letter count, to stand for a record with a short form."""

    letters: int = size(9, default=1)

    @classmethod
    def parse(cls, text: str) -> Word:
        return cls(letters=len(text))

    def __str__(self) -> str:
        return "w" * self.letters


@dataclass(frozen=True, kw_only=True)
class Outer(Spec):
    width: int = size(100)
    rate: float = share(0.1)
    scale: float = 1.0
    kind: str = choice("a", "b", default="a")
    flag: bool = False
    maybe: int | None = size(10, default=None)
    ids: tuple[int, ...] = ()
    inner: Inner | None = None
    word: Word = Word()

    def check(self) -> None:
        if self.kind == "b" and not self.flag:
            raise RequestError("kind='b': flag must be true")


def test_values_are_kept_as_their_annotations_say() -> None:
    record = Outer(width=3, scale=2, ids=[1, 2], word="www")  # type: ignore[arg-type]
    assert (record.scale, type(record.scale)) == (2.0, float)
    assert record.ids == (1, 2)
    assert record.word == Word(letters=3)


def test_numbers_of_a_list_may_be_words_as_a_command_line_has_them() -> None:
    assert Outer(width=3, ids=["1", "-2"]).ids == (1, -2)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"ids=\['1', 'x'\]: expected a list, each of it a whole number"):
        Outer(width=3, ids=["1", "x"])  # type: ignore[arg-type]


def test_plain_values_come_back_as_an_equal_record() -> None:
    record = Outer(width=3, ids=(4, 5), inner=Inner(rank=2), word=Word(letters=4), maybe=7)
    plain = record.to_dict()
    assert plain["word"] == "wwww"
    assert plain["ids"] == [4, 5]
    assert Outer.from_dict(plain) == record


def test_a_record_with_a_written_form_also_reads_its_fields() -> None:
    assert Outer.from_dict({"width": 1, "word": {"letters": 2}}).word == Word(letters=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width=0: expected a whole number from 1 to 100"),
        ({"width": -1}, "width=-1: expected a whole number from 1 to 100"),
        ({"width": 101}, "width=101: expected a whole number from 1 to 100"),
        ({"width": "abc"}, "width='abc': expected a whole number"),
        ({"width": 3.0}, "width=3.0: expected a whole number"),
        ({"width": True}, "width=True: expected a whole number"),
        ({"width": None}, "width=None: expected a whole number"),
        ({"width": 1, "rate": 1.0}, "rate=1.0: expected a probability, 0 or more and below 1"),
        ({"width": 1, "rate": -0.5}, "rate=-0.5: expected a probability, 0 or more and below 1"),
        ({"width": 1, "scale": float("nan")}, "scale=nan: expected a number"),
        ({"width": 1, "scale": float("inf")}, "scale=inf: expected a number"),
        ({"width": 1, "scale": 10**400}, "scale=1000"),
        ({"width": 1, "scale": "1"}, "scale='1': expected a number"),
        ({"width": 1, "kind": "c"}, "kind='c': expected one of a, b"),
        ({"width": 1, "flag": 1}, "flag=1: expected true or false"),
        ({"width": 1, "maybe": 11}, "maybe=11: expected a whole number from 1 to 10"),
        ({"width": 1, "maybe": "n"}, "maybe='n': expected a whole number or none"),
        ({"width": 1, "ids": [1, "2"]}, "ids=[1, '2']: expected"),
        ({"width": 1, "ids": 5}, "ids=5: expected"),
        ({"width": 1, "inner": 5}, "inner=5: expected fields of Inner, not a bare value"),
        ({"width": 1, "inner": {}}, "inner: the field 'rank' is missing; give it a value"),
        ({"width": 1, "inner": {"rank": 17}}, "inner.rank=17: expected a whole number from 1 to 16"),
        ({"width": 1, "inner": {"rank": 1, "nam": "y"}}, "unknown field 'inner.nam'"),
        ({"width": 1, "word": 3}, "word=3: expected"),
        ({"widht": 1}, "did you mean 'width'?"),
        ({}, "Outer: the field 'width' is missing; give it a value"),
        ({"width": 1, "kind": "b"}, "kind='b': flag must be true"),
    ],
)
def test_a_wrong_value_is_answered_with_what_was_expected(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as raised:
        Outer.from_dict(values)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy_are_kept_as_plain_ones() -> None:
    record = Outer(width=numpy.int64(3), scale=numpy.float32(0.5), rate=numpy.float64(0.25))  # type: ignore[arg-type]
    assert record.to_dict() == Outer(width=3, scale=0.5, rate=0.25).to_dict()
    assert {type(value) for value in (record.width, record.scale, record.rate)} == {int, float}
    assert type(plain(numpy.int32(4))) is int
    with pytest.raises(RequestError, match=r"width=2.5: expected a whole number"):
        Outer(width=numpy.float64(2.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [None, 3, "text", [1, 2]])
def test_something_other_than_fields_is_refused(values: object) -> None:
    with pytest.raises(RequestError, match="expected fields of Outer"):
        Outer.from_dict(values)  # type: ignore[arg-type]


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Inner(rank=1).rank = 2  # type: ignore[misc]


def test_an_unknown_name_is_answered_with_the_known_ones_and_the_likely_slip() -> None:
    line = unknown("fruit", "aple", ["apple", "pear"])
    assert line == "unknown fruit 'aple': expected one of apple, pear; did you mean 'apple'?"
    assert "did you mean" not in unknown("fruit", "zzz", ["apple", "pear"])
