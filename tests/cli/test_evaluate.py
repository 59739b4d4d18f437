"""`lathe evaluate`: what a sequence-to-sequence model writes, task by task; a run's own data; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import lathe
from lathe.text.tokenizer import Tokenizer
from lathe.text.train import train_tokenizer
from lathe.train.text_scores import score_texts

ROWS = [
    {"en": "the quick brown fox", "ko": "빠른 여우"},
    {"en": "a lathe turns wood and metal to the size that is asked for", "ko": "선반은 나무와 쇠를 깎는다"},
    {"en": "dog", "ko": "개"},
    {"en": "over the lazy dog", "ko": "게으른 개 위로"},
]
SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 24}
TASKS = """
objective: {name: seq2seq, max_source: 40}
data:
  tasks:
    korean: {train: none.jsonl, validation: pairs.jsonl, prefix: "to Korean: ", source: en, target: ko}
    english: {train: none.jsonl, validation: pairs.jsonl, prefix: "to English: ", source: ko, target: en}
    unchecked: {train: none.jsonl}
  length: 64
  rows: 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody trained, which writes something all the same, and pairs."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], 330, sentinels=2)
    tokens = {"pad": tokenizer.pad_id, "eos": [tokenizer.eos_id], "decoder_start": tokenizer.pad_id}
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size, "tokens": tokens}
    model = lathe.Model(lathe.preset("t5-small").with_(sizes), seed=3, tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what is written depends on the source
    model.save(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    (folder / "run.yaml").write_text(TASKS)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model", "pairs.jsonl", "run.yaml"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


PAIRS = ["objective=seq2seq", "data.fields.source=en", "data.fields.target=ko", "data.length=64", "device=cpu"]


def test_each_task_has_scores_of_what_was_written_for_it(cli: Callable, here: Path):
    asked = ["--run", "run.yaml", "generate.max_new_tokens=12", "device=cpu"]
    ran = cli("evaluate", "model", *asked, "--outputs", "out.jsonl", "bleu_tokenize=char", "batch=3", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    lines = [json.loads(line) for line in (here / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(found["tasks"]) == ["korean", "english"]
    for name, source, target in (("korean", "en", "ko"), ("english", "ko", "en")):
        mine, task = [line for line in lines if line["task"] == name], found["tasks"][name]
        assert [line["reference"] for line in mine] == [row[target] for row in ROWS]
        assert [line["source"] for line in mine] == [f"to {name.title()}: {row[source]}" for row in ROWS]
        scores = score_texts([line["output"] for line in mine], [row[target] for row in ROWS], bleu_tokenize="char")
        assert {key: task[key] for key in scores.to_dict()} == scores.to_dict()
        assert task["cut_off"] == sum(not line["ended"] for line in mine)
        assert task["generation"]["do_sample"] is False
    targets = sum(task["targets"] for task in found["tasks"].values())
    assert found["targets"] == targets
    mean = sum(task["loss"] * task["targets"] for task in found["tasks"].values()) / targets
    assert found["loss"] == pytest.approx(mean)
    table = cli("evaluate", "model", "--run", "run.yaml", "device=cpu", "write=false")
    assert "korean" in table.out
    assert "chrF" not in table.out


def test_what_is_written_does_not_depend_on_the_batch_and_is_what_generate_writes(cli: Callable, here: Path):
    for name, batch in (("one", 1), ("all", 32)):
        words = [*PAIRS, f"batch={batch}", "generate.max_new_tokens=9"]
        assert cli("evaluate", "model", *words, "--data", "pairs.jsonl", "--outputs", f"{name}.jsonl").code == 0
    assert (here / "one.jsonl").read_bytes() == (here / "all.jsonl").read_bytes()
    lines = [json.loads(line) for line in (here / "one.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["output"] for line in lines}) > 1
    for line in lines:
        ran = cli("generate", "model", "--prompt", line["source"], "--max-new-tokens", "9", "--greedy", "--json")
        assert json.loads(ran.out)["texts"][0]["text"] == line["output"]


def test_sampled_texts_depend_on_their_seed_alone(cli: Callable, here: Path):
    words = [*PAIRS, "generate.do_sample=true", "generate.max_new_tokens=6", "--data", "pairs.jsonl"]
    for name, more in {"a": ["batch=1"], "b": ["batch=3"], "c": ["generate.seed=5"]}.items():
        ran = cli("evaluate", "model", *words, *more, "--outputs", f"{name}.jsonl")
        assert ran.code == 0, ran.err
    assert (here / "a.jsonl").read_bytes() == (here / "b.jsonl").read_bytes()
    assert (here / "a.jsonl").read_bytes() != (here / "c.jsonl").read_bytes()


def test_bits_per_byte_are_of_the_target(cli: Callable, here: Path):
    ran = cli("evaluate", "model", *PAIRS, "write=false", "--limit", "3", "--data", "pairs.jsonl", "--json")
    found, tokenizer = json.loads(ran.out), Tokenizer.load("model")
    texts = [row["ko"] for row in ROWS[:3]]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)  # with the end mark
    n_bytes = sum(len(text.encode()) for text in texts)
    assert (found["documents"], found["targets"], found["bytes"]) == (3, tokens, n_bytes)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * tokens / math.log(2) / n_bytes)
    assert "bleu" not in found
    # A target that the objective shortens is still counted whole, its missing tokens at the mean.
    ran = cli("evaluate", "model", *PAIRS, "write=false", "objective.max_target=4", "--data", "pairs.jsonl", "--json")
    short = json.loads(ran.out)
    every = sum(len(tokenizer.encode(row["ko"])) for row in ROWS)
    assert short["targets"] < every
    assert short["bits_per_byte"] == pytest.approx(short["loss"] * every / math.log(2) / short["bytes"])


def test_the_longest_target_has_room_unless_a_length_is_given(cli: Callable, here: Path):
    found = json.loads(cli("evaluate", "model", *PAIRS, "--data", "pairs.jsonl", "--json").out)
    longest = max(len(Tokenizer.load("model").encode(row["ko"])) for row in ROWS)
    assert found["generation"]["max_new_tokens"] == longest + longest // 2
    model = lathe.load("model")
    for name, lengths in (("short", {"max_length": 5}), ("long", {"min_length": 56, "max_length": 142})):  # of others
        model.generation = lengths
        model.save(name)
        other = json.loads(cli("evaluate", name, *PAIRS, "--data", "pairs.jsonl", "--json").out)
        assert other["bleu"] == found["bleu"]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_text_that_a_stop_string_ends_is_not_cut_off(cli: Callable, here: Path, beams: int):
    words = [*PAIRS, "generate.max_new_tokens=9", f"generate.num_beams={beams}", "--data", "pairs.jsonl", "--json"]
    assert cli("evaluate", "model", *words, "--outputs", "whole.jsonl").code == 0
    whole = [json.loads(line) for line in (here / "whole.jsonl").read_text(encoding="utf-8").splitlines()]
    cut = next(line for line in whole if not line["ended"] and line["output"].strip())
    stop = f"generate.stop_strings={cut['output'].strip()[0]}"
    assert cli("evaluate", "model", *words, stop, "--outputs", "stopped.jsonl").code == 0
    stopped = [json.loads(line) for line in (here / "stopped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert next(line for line in stopped if line["source"] == cut["source"])["ended"]


def test_a_target_is_compared_with_one_text_whatever_the_model_came_with(cli: Callable, here: Path):
    shutil.copytree("model", "several")
    Path("several/generation_config.json").write_text('{"num_beams": 3, "num_return_sequences": 3}')
    ran = cli("evaluate", "several", *PAIRS, "--data", "pairs.jsonl", "--json", "--outputs", "texts.jsonl")
    assert ran.code == 0, ran.err
    assert len((here / "texts.jsonl").read_text(encoding="utf-8").splitlines()) == len(ROWS)


def test_what_stands_in_quotes_in_a_run_file_is_text(cli: Callable, here: Path):
    for prefix in ("[ko]", "2", "true", "none"):
        (here / "quoted.yaml").write_text(TASKS.replace('"to Korean: "', f'"{prefix}"'))
        words = ["device=cpu", "write=false", "limit=2", "--json"]
        ran = cli("evaluate", "model", "--run", "quoted.yaml", *words)
        assert ran.code == 0, ran.err
        tree = {
            **yaml.safe_load((here / "quoted.yaml").read_text()),
            "objective": {"name": "seq2seq", "max_source": 40},
        }
        (here / "run.json").write_text(json.dumps(tree))
        assert json.loads(cli("evaluate", "model", "--run", "run.json", *words).out) == json.loads(ran.out)


REFUSED = {
    "a file in the way": (["--outputs", "run.yaml"], "outputs=run.yaml exists"),
    "several texts a source": (["generate.num_return_sequences=2"], "one text is compared with each target"),
    "an unknown setting": (["generate.max_tokens=5"], "max_tokens"),
    "an idle setting": (["generate.temperature=0.5"], "temperature"),
    "an unknown tokenizer": (["bleu_tokenize=flores200"], "expected one of 13a, intl, char"),
    "nothing to write": (["write=false", "--outputs", "new.jsonl"], "write=false, so no text is written"),
    "no record": (["limit=0"], "limit=0"),
    "a limit given twice": (["limit=2", "--limit", "3"], "limit is set twice"),
    "a batch without writing": (["write=false", "batch=4"], "batch=4: write=false"),
    "no such column": (["data.fields.target=jp"], "there is no column 'jp'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_line_and_nothing_is_written(cli: Callable, here: Path, what: str):
    words, line = REFUSED[what]
    given = {word.partition("=")[0]: word for word in [*PAIRS, *words] if "=" in word}
    ran = cli("evaluate", "model", *given.values(), *[w for w in words if "=" not in w], "--data", "pairs.jsonl")
    assert ran.code == 2, ran.err
    assert line in ran.err.splitlines()[-1]
    assert not (here / "new.jsonl").exists()


def test_a_run_without_validation_data_is_named(cli: Callable, here: Path):
    (here / "bare.yaml").write_text("data: {train: pairs.jsonl}\nobjective: seq2seq")
    assert "the run has no validation data" in cli("evaluate", "model", "--run", "bare.yaml").err
    (here / "list.yaml").write_text("- 1")
    assert "the run names no data" in cli("evaluate", "model", "--run", "list.yaml").err
    assert "there is no run file" in cli("evaluate", "model", "--run", "nowhere.yaml").err
