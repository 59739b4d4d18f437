"""Checksums of files, held against the known digest of a known text."""

from __future__ import annotations

import pytest

from lathe.checkpoint.digest import digest, digest_file
from lathe.errors import RequestError

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_every_file_by_its_path(tmp_path):
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "b").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("nested/b")
    sums = digest(tmp_path)
    assert sums == {"a": EMPTY, "link": ABC, "nested/b": ABC}
    assert list(sums) == sorted(sums)
    assert digest_file(tmp_path / "nested" / "b") == ABC


def test_a_change_shows(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100_000))
    before = digest(tmp_path)
    (tmp_path / "a").write_bytes(bytes(99_999) + b"\x01")
    assert digest(tmp_path) != before


def test_not_a_directory(tmp_path):
    with pytest.raises(RequestError, match="is not a directory"):
        digest(tmp_path / "none")
