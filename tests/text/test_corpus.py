"""Reading the text to train on, and taking a sample of it."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import LatheError, RequestError
from lathe.text.corpus import read_every_line, read_lines, sample


def test_lines_keep_their_ends_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeff하나\r\n\n  \n둘\n".encode())
    (tmp_path / "b").write_bytes("셋".encode())
    assert list(read_lines([tmp_path / "a", tmp_path / "b"])) == ["하나\r\n", "둘\n", "셋"]
    assert list(read_lines(tmp_path / "b")) == ["셋"]
    assert list(read_lines(["a\nb\n", "c"])) == ["a\n", "b\n", "c"]


def test_a_file_that_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path) -> None:
    good = "좋은 줄\n".encode()
    (tmp_path / "bad").write_bytes(good + b"caf\xe9\n")
    (tmp_path / "good").write_bytes(good)
    with pytest.raises(RequestError, match=r"bad is not UTF-8: line 2, byte 4 of the line is 0xe9"):
        list(read_lines([tmp_path / "good", tmp_path / "bad"]))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("\n  \n\t\n")
    with pytest.raises(RequestError, match=r"a is empty: expected at least one line of text"):
        list(read_lines([tmp_path / "a"]))
    nothing: list[list[str]] = [[], [""], ["\n", " "]]
    for texts in nothing:
        with pytest.raises(RequestError, match="the corpus is empty"):
            list(read_lines(texts))


def test_a_byte_that_is_not_utf8_is_counted_with_the_mark_before_it(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes("\ufeff".encode() + b"caf\xe9\n")
    with pytest.raises(RequestError, match=r"line 1, byte 7 of the line is 0xe9"):
        list(read_lines(tmp_path / "bad"))


def test_an_archive_is_unpacked_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress("하나\n둘\n".encode()))
    assert list(read_lines(tmp_path / "a.gz")) == ["하나\n", "둘\n"]
    for content in (b"plain\n", gzip.compress(b"one\n" * 999)[:-9]):
        (tmp_path / "b.gz").write_bytes(content)
        with pytest.raises(LatheError, match=r"b\.gz is no gzip file, or is damaged"):
            list(read_lines(tmp_path / "b.gz"))


def test_where_each_line_is_answered_a_blank_one_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\ntwo\n")
    assert read_every_line(tmp_path / "a") == ["one", "two"]
    (tmp_path / "a").write_text("one\n \ntwo\n")
    with pytest.raises(RequestError, match=r"a, line 2 is blank"):
        read_every_line(tmp_path / "a")
    (tmp_path / "a").write_text("\n\n")
    with pytest.raises(RequestError, match=r"a is empty"):
        read_every_line(tmp_path / "a")


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ("text", "the corpus is one string"),
        ([1], "text 0 of the corpus is int 1"),
        (["fine", "a\udfff"], "text 1 of the corpus holds"),
        (tmp_path / "missing", "missing: No such file"),
        (tmp_path, "Is a directory"),
    ]
    for corpus, said in bad:
        with pytest.raises(RequestError, match=said):
            list(read_lines(corpus))


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 99))
def test_a_sample_is_so_many_of_the_lines_in_their_order(lines: int, count: int, seed: int) -> None:
    texts = [f"{number:02}" for number in range(lines)]
    taken = sample(texts, count, seed)
    assert len(taken) == min(lines, count)
    assert taken == sorted(taken)
    assert set(taken) <= set(texts)
    assert taken == sample(iter(texts), count, seed)


def test_every_line_is_as_likely_as_any_other() -> None:
    drawn = Counter(line for seed in range(2000) for line in sample("abcdefgh", 2, seed))
    # 500 of each on average; five standard deviations are 97.
    assert all(403 <= drawn[letter] <= 597 for letter in "abcdefgh")
