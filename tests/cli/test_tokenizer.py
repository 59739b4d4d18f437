"""`lathe tokenizer`: the files that it reads its text from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from lathe.text.tokenizer import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "a lathe turns wood and metal to the size that is asked for"] * 9
SIZE = ["vocab_size=300", "convention=gpt2"]


def _vocabulary(folder: Path) -> dict[str, int]:
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


def test_a_packed_file_and_columns_of_records_give_the_same_tokenizer_as_their_lines(cli: Callable, tmp_path: Path):
    plain, packed, records = tmp_path / "a.txt", tmp_path / "a.txt.gz", tmp_path / "a.jsonl"
    plain.write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pairs = [json.dumps({"en": first, "ko": second}) for first, second in zip(TEXT[::2], TEXT[1::2], strict=True)]
    records.write_text("\n".join(pairs), encoding="utf-8")
    made = {}
    for name, words in (
        ("plain", [plain]),
        ("packed", [packed]),
        ("records", [records, "--column", "en", "--column", "ko"]),
    ):
        ran = cli("tokenizer", tmp_path / name, "--from", *words, *SIZE)
        assert ran.code == 0, ran.err
        made[name] = _vocabulary(tmp_path / name)
    assert made["plain"] == made["packed"] == made["records"]
    assert Tokenizer.load(tmp_path / "packed").encode("the lathe", add_special_tokens=False)


def test_a_column_that_is_not_there_is_named(cli: Callable, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"en": "text"}), encoding="utf-8")
    ran = cli("tokenizer", tmp_path / "tok", "--from", tmp_path / "a.jsonl", "--column", "ko", *SIZE)
    assert ran.code == 2
    assert "no column 'ko'" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "tok").exists()


def test_records_are_not_taken_for_text_and_text_has_no_columns(cli: Callable, tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "a lathe"}) + "\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a lathe\n", encoding="utf-8")
    for words, line in (
        (["--from", tmp_path / "a.json"], "what kind of file is .json? expected"),
        (["--from", tmp_path / "a.txt", "--column", "ko"], "a.txt is plain text and has no columns"),
    ):
        ran = cli("tokenizer", tmp_path / "tok", *words, *SIZE)
        assert (ran.code, line in ran.err) == (2, True)
        assert not (tmp_path / "tok").exists()
