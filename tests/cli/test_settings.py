"""`field=value` words: what each spelling becomes, and the line that a wrong one gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.cli.settings import Setting, parse_settings
from lathe.errors import RequestError


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("d_model=512", "d_model", 512),
        ("d_model=-1", "d_model", -1),
        ("encoder.n_layers=4", "encoder.n_layers", 4),
        ("dropout=0.1", "dropout", 0.1),
        ("words=007", "words", "007"),
        ("seed=0", "seed", 0),
        ("eps=1e-6", "eps", 1e-6),
        ("dropout=.5", "dropout", 0.5),
        ("tied=false", "tied", False),
        ("tied=True", "tied", True),
        ("d_embed=none", "d_embed", None),
        ("d_embed=null", "d_embed", None),
        ("sharing=groups:3", "sharing", "groups:3"),
        ("data.train=[a.txt, b.jsonl]", "data.train", ["a.txt", "b.jsonl"]),
        ("d_model=abc", "d_model", "abc"),
        ("note=a=b", "note", "a=b"),
        ("scale=nan", "scale", "nan"),
        ("d_model=٣", "d_model", "٣"),
    ],
)
def test_a_value_becomes_what_it_looks_like(word: str, field: str, value: Setting) -> None:
    settings = parse_settings([word])
    assert settings == {field: value}
    assert type(settings[field]) is type(value)


def test_the_order_given_is_kept() -> None:
    assert list(parse_settings(["b=1", "a=2", "c.d=3"])) == ["b", "a", "c.d"]


def test_no_words_set_nothing() -> None:
    assert parse_settings([]) == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["d_model"], "'d_model' sets nothing"),
        (["d_model", "=", "512"], "'d_model' sets nothing"),
        (["=512"], "'' is not a field name"),
        (["d model=512"], "'d model' is not a field name"),
        (["encoder.=4"], "'encoder.' is not a field name"),
        ([".n_layers=4"], "'.n_layers' is not a field name"),
        (["d-model=4"], "'d-model' is not a field name"),
        (["d_model="], "has no value"),
        (["d_model=1", "d_model=1"], "d_model is set twice"),
        (["d_model=1e999"], "too large"),
        (["d_model=" + "9" * 5000], "5000 characters"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse_settings(words)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@given(st.text())
def test_any_word_is_read_or_refused(word: str) -> None:
    try:
        settings = parse_settings([word])
    except RequestError:
        return
    assert list(settings) == [word.partition("=")[0]]


@given(st.one_of(st.integers(-(10**38), 10**38), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_what_python_writes_is_read_back(value: Setting) -> None:
    assert parse_settings([f"x={value}"]) == {"x": value}
