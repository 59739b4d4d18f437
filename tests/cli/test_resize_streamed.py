"""`lathe resize` of a model that memory has no room for: one layer at a time, by itself, and the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import lathe
from lathe.text.train import train_tokenizer

WORDS = ("the", "a", "lathe", "turns", "wood", "metal", "stone", "to", "size", "that", "is", "asked", "for", "and")
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}
TEXT = ["--calibrate", "text.txt", "calibrate.length=32", "calibrate.tokens=900", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 in several shards, and text."""
    folder, chance = tmp_path_factory.mktemp("streamed"), random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=20)) for _ in range(40)]
    tokenizer = train_tokenizer(texts, 270, convention="gpt2")
    base = lathe.preset("gpt2")
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": [tokenizer.eos_id] if tokenizer.eos_id else []}
    architecture = base.with_({**SIZES, "vocab_size": tokenizer.vocab_size, "tokens": {**base.tokens.to_dict(), **ids}})
    lathe.Model(architecture, seed=0, tokenizer=tokenizer).save(folder / "gpt2", max_shard_bytes=12_000)
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the model and the text in it."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short_of_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr("lathe.reshape.room.free_bytes", lambda device: nbytes)


def weights(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("model*"))}


def test_short_memory_streams_by_itself_says_so_and_gives_the_same_bytes(
    cli: Callable, here: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = ["d_model=12", "vocab_size=262"]
    plain = cli("resize", "gpt2", "plain", *sizes, *TEXT)
    assert plain.code == 0, plain.err
    assert "streaming" not in plain.err
    short_of_memory(monkeypatch, 1000)
    streamed = cli("resize", "gpt2", "streamed", *sizes, *TEXT, "--json")
    assert streamed.code == 0, streamed.err
    assert "streaming: in memory this resize would take about" in streamed.err
    assert json.loads(streamed.out)["reload"]["largest"] == 0.0
    asked = cli("resize", "gpt2", "asked", *sizes, *TEXT, "stream=false")
    assert asked.code == 0, asked.err
    assert "streaming" not in asked.err
    again = cli("resize", "gpt2", "again", "--recipe", "plain", "--calibrate", "text.txt")
    assert again.code == 0, again.err
    assert "streaming" in again.err
    assert len(weights("plain")) > 2
    assert weights("plain") == weights("streamed") == weights("asked") == weights("again")
    assert not [path for path in here.rglob(".*") if path.name.startswith((".scratch", ".lathe-"))]


def test_a_result_that_fits_is_healed_beside_a_parent_that_is_streamed(
    cli: Callable, here: Path, monkeypatch: pytest.MonkeyPatch
):
    heal = ["d_model=12", "--heal", "text.txt", "heal.steps=2", "heal.rows=4", "heal.length=32", *TEXT]
    plain = cli("resize", "gpt2", "plain", *heal)
    assert plain.code == 0, plain.err
    streamed = cli("resize", "gpt2", "streamed", *heal, "stream=true")
    assert streamed.code == 0, streamed.err
    assert weights("plain") == weights("streamed")
    short_of_memory(monkeypatch, 1000)
    refused = cli("resize", "gpt2", "large", *heal)
    assert refused.code == 2
    assert "healing trains the whole result" in refused.err
    assert not Path("large").exists()


def test_a_streamed_budget_makes_the_same_plan(cli: Callable, here: Path):
    limit = int(0.7 * sum(map(len, weights("gpt2").values())))
    budget = ["--max-bytes", str(limit), "budget.effort=1", "method=select", *TEXT]
    plain = cli("resize", "gpt2", "plain", *budget)
    assert plain.code == 0, plain.err
    streamed = cli("resize", "gpt2", "streamed", *budget, "stream=true")
    assert streamed.code == 0, streamed.err
    assert weights("plain") == weights("streamed")
    assert not list(here.glob(".lathe-*"))
