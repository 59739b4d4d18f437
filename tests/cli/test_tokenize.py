"""`lathe tokenize` and `lathe tokenizer`: what people and scripts read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from lathe.text import Tokenizer
from tests.text.samples import CORPUS, trained

TEXTS = ("The statement.", "오늘은 날씨가 맑다. 안녕하세요 여러분!", "a")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained("t5").save(tmp_path / "t5")
    return tmp_path / "t5"


def test_the_json_holds_what_a_model_gets(cli, saved: Path) -> None:
    ran = cli("tokenize", saved, *TEXTS, "--json")
    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(ran.out)
    tokenizer = trained("t5")
    batch = tokenizer(list(TEXTS))
    assert (answer["vocab_size"], answer["pad_token"], answer["padding_side"]) == (800, "<pad>", "right")
    for number, row in enumerate(answer["texts"]):
        assert row["text"] == row["decoded"] == TEXTS[number]
        assert row["input_ids"] == batch.input_ids[number].tolist()
        assert row["attention_mask"] == batch.attention_mask[number].tolist()
        assert row["pieces"] == tokenizer.pieces(row["input_ids"])
        assert row["tokens"] == sum(row["attention_mask"]) == len(tokenizer.encode(TEXTS[number]))


def test_the_table_shows_texts_side_by_side_within_80_columns(cli, saved: Path) -> None:
    ran = cli("tokenize", saved, *TEXTS)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert all(cell_len(line) <= 80 for line in lines)
    header = next(line for line in lines if "text 1" in line)
    assert header.split() == ["text", "1", "id", "mask", "text", "2", "id", "mask", "text", "3", "id", "mask"]
    rows = [line for line in lines[lines.index(header) + 1 :] if line.strip()]
    tokenizer = trained("t5")
    ids = tokenizer(list(TEXTS)).input_ids.tolist()
    # Wide characters or not, the columns stand at the same place in every row.
    ends = {name: [cell_len(header[: at + len(name)]) for at in places(header, name)] for name in ("id", "mask")}
    for position, line in enumerate(rows):
        assert line.split()[0] == str(position)
        for number in range(len(TEXTS)):
            assert at_column(line, ends["id"][number]) == str(ids[number][position])
            real = position < len(tokenizer.encode(TEXTS[number]))
            assert at_column(line, ends["mask"][number]) == str(int(real))
            assert real or "<pad>" in line


def test_many_texts_take_several_tables(cli, saved: Path) -> None:
    ran = cli("tokenize", saved, *(f"statement {number}" for number in range(9)))
    headers = [line for line in ran.out.splitlines() if " id " in line]
    assert len(headers) > 1
    assert sum(line.count("text") for line in headers) == 9
    assert all(cell_len(line) <= 80 for line in ran.out.splitlines())


def test_a_pair_shows_token_types_and_the_side_can_be_chosen(cli, tmp_path: Path) -> None:
    trained("bert").save(tmp_path)
    ran = cli("tokenize", tmp_path, "a b", "a", "--pair", "c", "--padding-side", "left", "--json")
    answer = json.loads(ran.out)
    assert answer["padding_side"] == "left"
    assert [row["token_type_ids"] for row in answer["texts"]] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert [row["attention_mask"] for row in answer["texts"]] == [[1] * 6, [0] + [1] * 5]
    assert " type" in cli("tokenize", tmp_path, "a b", "--pair", "c").out


def test_texts_from_a_file(cli, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\n\n둘\n", encoding="utf-8")
    answer = json.loads(cli("tokenize", saved, "zero", "--file", tmp_path / "texts", "--json").out)
    assert [row["text"] for row in answer["texts"]] == ["zero", "one", "둘"]


def test_a_tokenizer_without_padding_is_shown_all_the_same(cli, tmp_path: Path) -> None:
    for name, data in trained("gpt2").files.items():
        if name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ran = cli("tokenize", tmp_path, "a", "a statement", "안", "\n")
    assert ran.code == 0
    assert "no padding token" in ran.out
    assert "\\n" in ran.out
    assert json.loads(cli("tokenize", tmp_path, "a", "a statement", "--json").out)["pad_token"] is None


BAD: list[tuple[tuple[str, ...], str]] = [
    (("t5",), "there is nothing to tokenize: give TEXT"),
    (("t5", "a", "--padding-side", "up"), "--padding-side up: expected left or right"),
    (("t5", "--file", "bad"), "bad is not UTF-8: line 2, byte 1"),
    (("t5", "--file", "none"), "none: No such file"),
    (("./empty", "a"), "holds no tokenizer"),
    (("./nowhere", "a"), "nowhere"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_requests_to_tokenize(cli, saved: Path, words: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    Path("bad").write_bytes(b"fine\n\xff\n")
    Path("empty").mkdir()
    ran = cli("tokenize", *words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1


# --- lathe tokenizer --------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    return tmp_path / "corpus.txt"


def test_a_tokenizer_is_trained_and_saved(cli, corpus: Path, tmp_path: Path) -> None:
    words = ("tokenizer", tmp_path / "new", "--from", corpus, "vocab_size=800", "sentinels=10")
    ran = cli(*words, "--json")
    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(ran.out)
    tokenizer = Tokenizer.load(tmp_path / "new")
    assert answer["vocab_size"] == tokenizer.vocab_size == 800
    assert answer["sentinels"] == len(tokenizer.sentinels) == 10
    assert answer["files"] == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert answer["bytes"] == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    lines = [line for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokens = sum(len(row) for row in tokenizer.encode_batch(lines, add_special_tokens=False))
    assert answer["measured"]["characters_per_token"] == pytest.approx(sum(map(len, lines)) / tokens)
    assert answer["measured"]["unknown_share"] == 0
    shown = cli(
        "tokenizer", tmp_path / "again", "--from", corpus, "vocab_size=500", "convention=bert", "model=wordpiece"
    )
    assert shown.code == 0
    assert "500 tokens" in shown.out
    assert "cls 2" in shown.out


BAD_TRAINING: list[tuple[tuple[str, ...], str]] = [
    ((), "there is no text to train on: give --from FILE"),
    (("--from", "corpus.txt", "size=5"), "a tokenizer has no size: expected one of vocab_size"),
    (("--from", "corpus.txt", "vocab_size=abc"), "vocab_size='abc'"),
    (("--from", "corpus.txt", "vocab_size=100000"), "the largest that fits is"),
    (("--from", "corpus.txt", "vocab_size"), "'vocab_size' sets nothing"),
    (("--from", "none.txt"), "none.txt: No such file"),
    (("--from", "bad.txt"), "bad.txt is not UTF-8: line 2, byte 1"),
    (("--from", "empty.txt"), "is empty"),
]


@pytest.mark.parametrize(("words", "said"), BAD_TRAINING)
def test_bad_requests_to_train_leave_nothing_behind(
    cli, corpus: Path, words: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    Path("bad.txt").write_bytes(b"fine\n\xff\n")
    Path("empty.txt").write_text("\n \n")
    before = sorted(Path.cwd().iterdir())
    ran = cli("tokenizer", "new", *words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(Path.cwd().iterdir()) == before


def test_a_place_that_is_taken_is_refused_before_training(cli, saved: Path, tmp_path: Path) -> None:
    ran = cli("tokenizer", saved, "--from", tmp_path / "none.txt")
    assert ran.code == 2
    assert "already exists" in ran.err


def places(line: str, word: str) -> list[int]:
    """Where the word stands in the line, each time as a word of its own."""
    padded = f" {line} "
    found, start = [], 0
    while (at := padded.find(f" {word} ", start)) >= 0:
        found.append(at)
        start = at + 1
    return found


def at_column(line: str, end: int) -> str:
    """The word that ends at this column of a terminal."""
    width, taken = 0, ""
    for character in line:
        width += cell_len(character)
        taken += character
        if width >= end:
            break
    return taken.rsplit(maxsplit=1)[-1]
