"""The cache: the same corpus again, another one for anything else, and damage that is noticed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lathe.data import cached, tokenise_records
from lathe.data.tokenise import Encoder
from lathe.errors import LatheError, RequestError
from lathe.text.tokenizer import Tokenizer
from lathe.text.train import train_tokenizer

RECORDS = [
    {"text": "the fox jumps. a dog runs!", "label": "1"},
    {"text": "", "label": "0"},
    {"text": "trains", "label": "1"},
]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one each time that text is tokenised."""
    times: list[int] = []
    chunks = Encoder.chunks

    def counted(self: Encoder, records: object) -> Iterator[dict[str, list[list[int]]]]:
        times.append(1)
        return chunks(self, records)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "chunks", counted)
    return times


def caches(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def test_the_second_time_nothing_is_tokenised(tmp_path: Path, wordpiece: Tokenizer, encoded: list[int]):
    wanted = tokenise_records(wordpiece, RECORDS, breaks="sentence")
    encoded.clear()
    for _ in range(2):
        corpus = cached(tmp_path, wordpiece, lambda: iter(RECORDS), breaks="sentence")
        assert corpus.digest() == wanted.digest()
        assert isinstance(corpus.fields["text"].flat, np.memmap)
        assert corpus.fields["text"].row(2).tolist() == wanted.fields["text"].row(2).tolist()
        assert corpus.labels is not None
        assert corpus.labels.tolist() == [1, 0, 1]
    assert encoded == [1]


def test_anything_else_is_another_cache(tmp_path: Path, wordpiece: Tokenizer, encoded: list[int]):
    other = train_tokenizer(["the fox jumps. a dog runs! trains"] * 9, 40, convention="bert")
    changed = [{**RECORDS[0], "label": "0"}, *RECORDS[1:]]
    moved = [{"text": "the fox jumps. a dog runs!1", "label": "0"}, *RECORDS[1:]]
    cached(tmp_path, wordpiece, lambda: RECORDS)
    cached(tmp_path, other, lambda: RECORDS)
    cached(tmp_path, wordpiece, lambda: changed)
    cached(tmp_path, wordpiece, lambda: moved)
    cached(tmp_path, wordpiece, lambda: RECORDS[::-1])
    cached(tmp_path, wordpiece, lambda: RECORDS, breaks="line")
    cached(tmp_path, wordpiece, lambda: RECORDS, labels=["1", "0"])
    assert len(encoded) == len(caches(tmp_path)) == 7


@pytest.mark.parametrize("damage", ["bit", "short", "manifest", "missing", "no manifest"])
def test_a_damaged_cache_is_made_again_loudly(
    tmp_path: Path, wordpiece: Tokenizer, damage: str, caplog: pytest.LogCaptureFixture
):
    wanted = cached(tmp_path, wordpiece, lambda: RECORDS).digest()
    (place,) = caches(tmp_path)
    tokens, manifest = place / "text.tokens", place / "cache.json"
    data = tokens.read_bytes()
    if damage == "bit":
        tokens.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "short":
        tokens.write_bytes(data[:-2])
    elif damage == "missing":
        tokens.unlink()
    elif damage == "manifest":
        manifest.write_text('{"files": 3}')
    else:
        manifest.unlink()
    with caplog.at_level(logging.WARNING):
        assert cached(tmp_path, wordpiece, lambda: RECORDS).digest() == wanted
    assert [f"the cache {place} is damaged" in line for line in caplog.text.splitlines()] == [True]
    caplog.clear()
    assert cached(tmp_path, wordpiece, lambda: RECORDS).digest() == wanted
    assert not caplog.text


def test_two_processes_make_one_cache(tmp_path: Path, wordpiece: Tokenizer):
    wordpiece.save(tmp_path / "tokenizer")
    program = f"""
from pathlib import Path
from lathe.data import cached
from lathe.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load({str(tmp_path / "tokenizer")!r})
texts = [{{"text": f"the fox jumps {{i}}"}} for i in range(4000)]
print(cached({str(tmp_path / "caches")!r}, tokenizer, lambda: texts).digest())
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    digests = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(digests) == 1
    assert len(caches(tmp_path / "caches")) == 1


def test_what_goes_wrong_leaves_nothing_behind(tmp_path: Path, wordpiece: Tokenizer):
    with pytest.raises(RequestError, match="record 2: label 'x' is no class number"):
        cached(tmp_path, wordpiece, lambda: [RECORDS[0], {"text": "a", "label": "x"}])
    with pytest.raises(RequestError, match="no document"):
        cached(tmp_path, wordpiece, list)
    times: list[int] = []

    def growing() -> list[dict[str, str]]:
        times.append(1)
        return RECORDS * len(times)

    with pytest.raises(LatheError, match="the data changed while it was read"):
        cached(tmp_path, wordpiece, growing)
    assert caches(tmp_path) == []
