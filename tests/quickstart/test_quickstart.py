"""The journey in small: the same steps on less text, for every story; the corpus; the page."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers

import lathe
from lathe.errors import RequestError
from lathe.quickstart import run as journey
from lathe.quickstart.corpus import Corpus, python_corpus
from lathe.quickstart.report import page
from lathe.quickstart.story import STORIES, story


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def work(self, title: str, total: int):
        def advance(done: int = 1, note: str = "") -> None:
            self.done += done

        yield advance


@pytest.fixture(scope="module")
def text() -> Corpus:
    from pydoc_data.topics import topics

    documents = [value for _, value in sorted(topics.items())][:40]
    return Corpus(documents[:34], documents[34:])


def small(name: str) -> object:
    sizes = {**STORIES[name].sizes, "n_layers": 1, "d_ff": 32}
    return dataclasses.replace(STORIES[name], sizes=sizes, vocab_size=500, steps=3, heal_steps=2, rows=2, length=48)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, text: Corpus) -> None:
    """Less text and fewer steps; everything else is the command's own."""
    monkeypatch.setattr(journey, "python_corpus", lambda: text)
    monkeypatch.setattr(journey, "story", small)


@pytest.mark.parametrize("name", STORIES)
def test_the_whole_journey(name: str, short: None, tmp_path: Path) -> None:
    told = Silent()
    done = journey.run(name, tmp_path, seed=3, reporter=told)
    assert [row.name for row in done.rows] == ["parent", "truncated", "rotated", "healed"]
    parent, *cuts = done.rows
    assert len({row.parameters for row in cuts}) == 1
    assert cuts[0].parameters < parent.parameters
    assert told.done == 5
    assert done.reload_error == 0.0
    for row in done.rows:
        folder = tmp_path / row.name
        assert row.bytes == (folder / "model.safetensors").stat().st_size
        assert lathe.load(folder).plan().before.parameters.total == row.parameters
    stock = transformers.AutoModel.from_pretrained(tmp_path / "healed")
    assert type(stock.config).model_type == lathe.load(tmp_path / "healed").architecture.family
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "healed")("a lathe").input_ids
    shown = page(done)
    assert shown.count("<svg") == 3
    assert f"{parent.parameters:,}" in shown
    json.dumps(done.to_dict(), allow_nan=False)


def test_a_seed_gives_the_same_numbers_again(short: None, tmp_path: Path) -> None:
    first, second = (journey.run("t5", folder(tmp_path, n), seed=3, reporter=Silent()) for n in "ab")
    assert [row.loss for row in first.rows] == [row.loss for row in second.rows]
    assert first.curves == second.curves
    assert first.examples == second.examples
    third = journey.run("t5", folder(tmp_path, "c"), seed=4, reporter=Silent())
    assert [row.loss for row in third.rows] != [row.loss for row in first.rows]


def folder(path: Path, name: str) -> Path:
    made = path / name
    made.mkdir()
    return made


def test_the_corpus_is_real_text_and_its_parts_are_apart() -> None:
    corpus = python_corpus()
    assert corpus.characters > 1_000_000
    assert not set(corpus.train) & set(corpus.validation)
    assert any("assert statement" in text.lower() for text in [*corpus.train, *corpus.validation])


def test_an_unknown_family_is_refused_before_anything_is_done(cli, tmp_path: Path) -> None:
    ran = cli("quickstart", "--family", "t6", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "unknown family for the quickstart 't6'" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="t5, gpt2, llama, albert"):
        story("t6")


def test_a_folder_that_is_not_the_quickstarts_is_refused(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran = cli("quickstart", "--out", tmp_path)
    assert ran.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
