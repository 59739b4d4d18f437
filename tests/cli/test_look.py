"""`lathe look`: tables, one JSON object, a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lathe
from lathe.text import train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(["to be or not to be that is the question"] * 20, 280, convention="gpt2")
    sizes = {"vocab_size": 280, "n_layers": 2, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": None, "max_positions": 16}
    path = tmp_path_factory.mktemp("models") / "gpt2"
    lathe.Model(lathe.preset("gpt2").with_({**sizes, **tokens}), seed=1, tokenizer=tokenizer).save(path)
    return path


def test_it_shows_the_way_and_draws_it(cli, saved: Path, tmp_path: Path) -> None:
    ran = cli("look", saved, "--text", "to be or", "--layer", "2", "--out", tmp_path / "a.png")
    assert ran.code == 0
    for part in ("decoder: ", "|vector|", "layer 2, head 1: q·k", "mean of all heads", "modules: "):
        assert part in ran.out
    assert (tmp_path / "a.png").stat().st_size > 1000
    answer = json.loads(cli("look", saved, "--text", "to be or", "--json").out)
    assert {"text", "layer", "tokens", "attention", "modules"} == answer.keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text", ""], "holds no token"),
        (["--text", "a", "--layer", "9"], "layer=9: expected 1 to 2"),
        (["--text", "a", "--head", "9"], "--head 9: expected 1 to 2"),
        (["--text", "a", "--out", "a.jpg"], "ends in .png"),
        (["--text", "to be or " * 20], "16"),
        ([], "--text"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(cli, saved: Path, words: list[str], says: str) -> None:
    ran = cli("look", saved, *words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert says in ran.err
