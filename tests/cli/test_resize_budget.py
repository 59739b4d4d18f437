"""`lathe resize` with a budget: the result is within it, the plan is shown and kept, and a replay measures nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lathe
from lathe.text.train import train_tokenizer

WORDS = ("the", "a", "lathe", "turns", "wood", "metal", "stone", "to", "size", "that", "is", "asked", "for", "and")
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small GPT-2 and text."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=20)) for _ in range(40)]
    tokenizer = train_tokenizer(texts, 270, convention="gpt2")
    base = lathe.preset("gpt2")
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": [tokenizer.eos_id] if tokenizer.eos_id else []}
    architecture = base.with_({**SIZES, "vocab_size": tokenizer.vocab_size, "tokens": {**base.tokens.to_dict(), **ids}})
    lathe.Model(architecture, seed=0, tokenizer=tokenizer).save(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_result_is_within_the_budget_and_replays_without_measuring_again(cli: Callable, here: Path):
    text = ["--calibrate", "text.txt", "--device", "cpu"]
    small = ["calibrate.length=32", "calibrate.tokens=900", "budget.effort=1", "method=select"]
    limit = int(0.7 * Path("gpt2/model.safetensors").stat().st_size)
    shown = cli("resize", "gpt2", "small", "--max-bytes", str(limit), "--plan-only", *text, *small)
    assert shown.code == 0, shown.err
    assert "Best single axis" in shown.out or "No single axis" in shown.out
    assert not Path("small").exists()
    ran = cli("resize", "gpt2", "small", "--max-bytes", str(limit), "--json", *text, *small)
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    plan = answer["budget"]
    assert Path("small/model.safetensors").stat().st_size == plan["after"] <= limit
    assert answer["changes"] == plan["changes"]
    assert answer["reload"]["missing"] == answer["reload"]["unexpected"] == []
    recipe = json.loads(Path("small/lathe.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["stages"][0]["resize"] == plan["changes"]
    assert recipe["budget"]["rows"] == plan["rows"]
    page = Path("small/report.html").read_text(encoding="utf-8")
    assert "How the budget was spent" in page
    again = cli("resize", "gpt2", "again", "--recipe", "small", *text)
    assert again.code == 0, again.err
    assert "trial" not in again.err
    assert Path("again/model.safetensors").read_bytes() == Path("small/model.safetensors").read_bytes()
    assert "How the budget was spent" in Path("again/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--max-parameters", "10"], "the least possible is "),
        (["--max-parameters", "1B"], "which is within it: nothing to cut"),
        (["--max-parameters", "4k", "--max-bytes", "9MB"], "max_parameters and max_bytes are two budgets: give one"),
        (["--max-bytes", "lots"], "max_bytes='lots': expected bytes"),
        (["--max-parameters", "4k", "sharing=all", "remainder=2"], "and here a budget cuts more; give sharing=all"),
        (["d_ff=12", "--plan-only"], "--plan-only shows a budget's plan"),
        (["--max-bytes", "9kB", "max_bytes=9kB"], "max_bytes is set twice"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(cli: Callable, here: Path, words: list[str], line: str):
    ran = cli("resize", "gpt2", "small", *words, "--calibrate", "text.txt", "--device", "cpu")
    assert ran.code == 2
    assert line in ran.err
    assert "Traceback" not in ran.err
    assert not Path("small").exists()


def test_files_of_several_types_are_counted_as_they_are_and_what_they_become_is_said(cli: Callable, here: Path):
    file = Path("gpt2/model.safetensors")
    tensors = load_file(file)
    mixed = {name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    save_file(mixed, file, metadata={"format": "pt"})
    limit = str(file.stat().st_size)
    text = ["--calibrate", "text.txt", "--device", "cpu", "calibrate.length=32", "calibrate.tokens=900"]
    within = cli("resize", "gpt2", "small", "--max-bytes", limit, *text)
    assert (within.code, "the model's files have " in within.err) == (2, True), within.err
    ran = cli("resize", "gpt2", "small", "d_ff=12", *text)
    assert ran.code == 0, ran.err
    assert "gpt2 holds several types, and all of it is read and written as float32" in ran.err
    again = cli("resize", "small", "smaller", "d_ff=8", *text)
    assert (again.code, "several types" in again.err) == (0, False), again.err


def test_a_budget_without_text_says_what_to_give(cli: Callable, here: Path):
    ran = cli("resize", "gpt2", "small", "--max-parameters", "4k")
    assert (ran.code, "give --calibrate FILE" in ran.err) == (2, True)


def test_a_healing_that_was_killed_goes_on_with_the_plan_it_began_with(cli: Callable, here: Path):
    limit = int(0.7 * Path("gpt2/model.safetensors").stat().st_size)
    words = [
        "gpt2",
        "small",
        "--max-bytes",
        str(limit),
        "--calibrate",
        "text.txt",
        "--device",
        "cpu",
        "--heal",
        "text.txt",
    ]
    words += ["calibrate.length=32", "calibrate.tokens=900", "budget.effort=1", "method=select"]
    words += ["heal.steps=80", "heal.save_every=1", "heal.rows=2"]
    killed = subprocess.Popen([sys.executable, "-m", "lathe", "resize", *words], stderr=subprocess.DEVNULL)
    while not Path("small.heal/stage-1/checkpoints/last").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not Path("small").exists()
    plan = json.loads(Path("small.heal/budget-plan.json").read_text(encoding="utf-8"))["plan"]
    less = str(limit * 3 // 4)  # another plan would be made anew, and the run would refuse it
    for changed, line in (
        ([less if word == str(limit) else word for word in words], f"began with budget.bytes={limit}, and"),
        ([*words, "heal.lr=0.01"], "began with heal.lr=none, and this one says 0.01"),
        ([*words, "n_layers=1"], "whose sizes were found for another request"),
        ([*words, "--data", "text.txt"], "began with text.calibrate="),  # none of it is kept apart then
    ):
        other = cli("resize", *changed)
        assert (other.code, "trial" in other.err, line in other.err) == (2, False, True), other.err
    ran = cli("resize", *words, "--json")
    assert ran.code == 0, ran.err
    assert "the plan is the one in" in ran.err
    assert "trial" not in ran.err
    answer = json.loads(ran.out)
    assert answer["budget"] == plan
    assert answer["changes"] == plan["changes"]
    assert not Path("small.heal").exists()
