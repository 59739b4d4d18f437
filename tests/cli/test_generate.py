"""`lathe generate`: what it prints, what it passes on, and its one line where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lathe
from lathe.text import train_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog while seventeen rabbits watch from behind the garden wall",
    "to be or not to be that is the question whether tis nobler in the mind to suffer slings and arrows",
] * 12


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer, saved."""
    tokenizer = train_tokenizer(CORPUS, 300, convention="gpt2")
    sizes = {"vocab_size": 300, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id, "max_positions": 64}
    model = lathe.Model(lathe.preset("gpt2").with_({**tokens, **sizes}), seed=1, tokenizer=tokenizer)
    path = tmp_path_factory.mktemp("models") / "gpt2"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with a tokenizer, saved, whose stored settings ask for beams."""
    tokenizer = train_tokenizer(CORPUS, 320, convention="t5", sentinels=4)
    sizes = {"vocab_size": 320, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    stored = {"num_beams": 4, "max_new_tokens": 5}
    model = lathe.Model(lathe.preset("t5-small").with_(sizes), seed=1, tokenizer=tokenizer, generation=stored)
    path = tmp_path_factory.mktemp("models") / "t5"
    model.save(path)
    return path


def test_it_prints_the_prompt_and_what_follows(cli, gpt2: Path) -> None:
    ran = cli("generate", gpt2, "--prompt", "the quick", "--max-new-tokens", "4")
    assert ran.code == 0
    assert ran.out.startswith("the quick")
    assert "4 tokens in" in ran.err
    assert ran.out == cli("generate", gpt2, "--prompt", "the quick", "--max-new-tokens", "4").out


def test_json_holds_every_text_and_nothing_else_is_printed(cli, gpt2: Path) -> None:
    ran = cli("generate", gpt2, "--prompt", "to be", "--prompt", "fox", "--max-new-tokens", "3", "--json")
    answer = json.loads(ran.out)
    assert [each["prompt"] for each in answer["texts"]] == ["to be", "fox"]
    assert not answer["sampled"]
    assert {"text", "ids", "ended", "tokens"} <= answer["texts"][0].keys()
    printed = cli("generate", gpt2, "--prompt", "to be", "--max-new-tokens", "3").out
    assert printed == "to be" + answer["texts"][0]["text"] + "\n"


def test_a_temperature_samples_and_the_seed_it_reports_gives_the_same_text(cli, gpt2: Path) -> None:
    words = ("generate", gpt2, "--prompt", "to be", "--temperature", "2.0", "--num-return-sequences", "2", "--json")
    first = json.loads(cli(*words).out)
    assert first["sampled"]
    again = json.loads(cli(*words, "--seed", str(first["seed"])).out)
    assert again == first
    assert first["texts"][0]["ids"] != first["texts"][1]["ids"]


def test_prompts_come_from_a_file_too(cli, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("to be\nfox\n", encoding="utf-8")
    answer = json.loads(cli("generate", gpt2, "--file", tmp_path / "prompts.txt", "--json").out)
    assert [each["prompt"] for each in answer["texts"]] == ["to be", "fox"]


def test_an_encoder_decoder_prints_what_it_makes_of_the_prompt(cli, t5: Path) -> None:
    """And says what of the stored settings is left out."""
    one = cli("generate", t5, "--prompt", "to be", "--special-tokens")
    assert one.code == 0
    assert "asks for num_beams=4, which Lathe does not do" in one.err
    assert "to be\n→" not in one.out
    two = cli("generate", t5, "--prompt", "to be", "--prompt", "fox")
    assert "to be\n→" in two.out
    assert "fox\n→" in two.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is nothing to start from"),
        (["--prompt", ""], "prompt 1 is '' and holds no token"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--max-new-tokens", "many"], "many"),
        (["--prompt", "a", "--temperature", "0"], "temperature=0.0: expected more than 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--top-k", "0"], "top_k=0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5"),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "top_p=0.5: nothing is sampled"),
        (["--prompt", "a", "--num-return-sequences", "2"], "num_return_sequences=2: without sampling"),
        (["--prompt", "a", "--seed", "-1"], "seed=-1"),
        (["--prompt", "a", "--max-new-tokens", "90"], "64 positions"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus: there is no such device"),
        (["--file", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(cli, gpt2: Path, words: list[str], says: str) -> None:
    ran = cli("generate", gpt2, *words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert says in ran.err


def test_a_file_that_is_not_utf_8_is_one_line(cli, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"to be\n\xff\xfe\n")
    ran = cli("generate", gpt2, "--file", tmp_path / "prompts.txt")
    assert ran.code == 2
    assert "UTF-8" in ran.err


def test_a_model_without_a_tokenizer_says_so(cli, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 300, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    lathe.Model(lathe.preset("gpt2").with_({"tokens.eos": [], "tokens.bos": None, **sizes})).save(tmp_path / "bare")
    ran = cli("generate", tmp_path / "bare", "--prompt", "a")
    assert ran.code == 2
    assert "has no tokenizer" in ran.err
