"""`lathe train`: a run file and words become one run; what is wrong is one line and leaves nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lathe
from lathe.text.train import train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "a lathe turns wood and metal to the size that is asked for"] * 9
SIZES = ["d_model=16", "n_layers=1", "n_heads=2", "d_head=8", "d_ff=24", "max_positions=64"]
WORDS = ["objective=causal", "tokenizer=tok", "data.length=32", "data.rows=4", "device=cpu", *SIZES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    train_tokenizer(TEXT, 300, convention="gpt2").save(folder / "tok")
    (folder / "text.txt").write_text("\n".join(TEXT), encoding="utf-8")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a tokenizer and some text in it."""
    for name in ("tok", "text.txt"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # the cache of token ids is there
    return tmp_path


def test_a_preset_is_trained_and_opens_in_lathe_and_transformers(cli: Callable, here: Path):
    options = ["--data", "text.txt", "--validation", "text.txt", "--out", "run", "--json"]
    ran = cli("train", "gpt2", *WORDS, "steps=4", "evaluate_every=2", "optimizer.lr=1e-2", *options)
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["step"] == 4
    assert answer["evaluation"]["loss"] == answer["best_evaluation"]["loss"]
    assert "of peak" in ran.err
    model = lathe.load(answer["model"])
    assert model.tokenizer is not None
    assert model.architecture.embedding.vocab_size == model.tokenizer.vocab_size
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(answer["model"])
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_several_files_are_one_corpus_and_validation_has_columns_of_its_own(cli: Callable, here: Path):
    (here / "more.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT), encoding="utf-8")
    (here / "held.tsv").write_text("document\tlabel\n" + "\n".join(f"{line}\t1" for line in TEXT), encoding="utf-8")
    files = ["data.train=[text.txt,more.jsonl]", "data.validation=held.tsv", "data.validation_fields.text=document"]
    ran = cli("train", "gpt2", *WORDS, "steps=1", *files, "--out", "run", "--json")
    assert ran.code == 0, ran.err
    assert f"{2 * len(TEXT)} documents" in ran.err
    assert json.loads(ran.out)["evaluation"]["loss"] > 0
    refused = cli("train", "gpt2", *WORDS, "steps=1", "data.train=[text.txt,none.txt]", "--out", "other")
    assert refused.code == 2
    assert "none.txt" in refused.err
    assert not (here / "other").exists()


def test_a_run_file_takes_words_and_resumes(cli: Callable, here: Path):
    (here / "run.yaml").write_text(
        """
        model: gpt2
        tokenizer: tok
        architecture: {d_model: 16, n_layers: 1, n_heads: 2, d_head: 8, d_ff: 24, max_positions: 64}
        objective: {name: causal}
        data: {train: text.txt, length: 32, rows: 4}
        optimizer: {lr: 3e-3, clip: none}
        save: {every: 2, tensorboard: true}
        steps: 3
        out: run
        device: cpu
        """
    )
    assert cli("train", "run.yaml", "optimizer.lr=1e-3").code == 0
    asked = json.loads((here / "run" / "run.json").read_text())
    assert asked["optimizer"]["lr"] == 1e-3
    assert asked["optimizer"]["clip"] is None
    assert list((here / "run" / "tensorboard").iterdir())
    again = cli("train", "run.yaml", "optimizer.lr=1e-3", "--resume")
    assert again.code == 0
    assert "finished already" in again.out
    assert cli("train", "run.yaml", "optimizer.lr=1e-3").code == 2
    other = cli("train", "run.yaml", "--resume")
    assert other.code == 2
    assert "was started with optimizer.lr=0.001 and this one says 0.003" in other.err
    rows = cli("train", "run.yaml", "optimizer.lr=1e-3", "data.rows=2", "--resume")
    assert "was started with data.rows=4 and this one says 2" in rows.err


def test_a_trained_model_is_trained_on(cli: Callable, here: Path):
    assert cli("train", "gpt2", *WORDS, "steps=2", "--data", "text.txt", "--out", "one").code == 0
    start = "one/checkpoints/last"
    words = ["objective=causal", "steps=1", "data.length=32", "device=cpu", "optimizer.kind=adafactor"]
    ran = cli("train", start, *words, "data=text.txt", "out=two")
    assert ran.code == 0, ran.err
    before, after = (lathe.load(name).tensors() for name in (start, "two/checkpoints/last"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert cli("train", "gpt2", *WORDS, "steps=1", "--data", "text.txt", "--out", "another").code == 0
    other = cli("train", "another/checkpoints/last", *words, "data=text.txt", "out=two", "--resume")
    assert other.code == 2
    assert "was started with start_weights=" in other.err
    assert "finished already" in cli("train", start, *words, "data=text.txt", "out=two", "--resume").out
    refused = cli("train", start, *words, "data=text.txt", "d_model=32", "out=three")
    assert refused.code == 2
    assert "has trained weights of its own sizes" in refused.err
    assert not (here / "three").exists()


def test_a_pretrained_encoder_becomes_a_classifier_and_is_evaluated(cli: Callable, here: Path):
    train_tokenizer(TEXT, 90, convention="bert").save(here / "bert-tok")
    sizes = ["d_model=16", "n_layers=1", "n_heads=2", "d_head=8", "d_ff=24", "max_positions=64"]
    words = ["data.length=32", "data.rows=4", "device=cpu", "seed=1"]
    first = ["head=masked", "tokenizer=bert-tok", "objective=masked", "steps=2", "out=pretrained", *sizes]
    ran = cli("train", "bert-base-uncased", *words, *first, "data=text.txt")
    assert ran.code == 0, ran.err
    reviews = "".join(f"{'good fox' if i % 2 else 'bad dog'}\t{'pos' if i % 2 else 'neg'}\n" for i in range(24))
    (here / "reviews.tsv").write_text("document\tsaid\n" + reviews)
    columns = ["data.fields.text=document", "data.fields.label=said", "data.labels=neg, pos"]
    task = ["objective=classification", "steps=60", "optimizer.lr=5e-3", "dropout=0.0", "out=tuned"]
    ran = cli(
        "train", "pretrained/checkpoints/last", "head=classification", *words, *columns, *task, "--data", "reviews.tsv"
    )
    assert ran.code == 0, ran.err
    before, after = (lathe.load(f"{name}/checkpoints/last") for name in ("pretrained", "tuned"))
    assert after.architecture.head.classifier is not None
    assert after.architecture.d_model == before.architecture.d_model
    ran = cli("evaluate", "tuned/checkpoints/last", *columns, "--data", "reviews.tsv", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["accuracy"], found["f1"], found["documents"]) == (1.0, 1.0, 24)
    wrong = cli("evaluate", "tuned/checkpoints/last", "data.fields.text=nothing", "--data", "reviews.tsv")
    assert wrong.code == 2
    assert "there is no column 'nothing'" in wrong.err


def test_one_model_learns_several_tasks(cli: Callable, here: Path):
    train_tokenizer(TEXT, 312, sentinels=4).save(here / "t5-tok")
    lines = [json.dumps({"en": "the lazy dog", "ko": "wood and metal"})] * 6
    (here / "docs.jsonl").write_text("\n".join(lines))
    (here / "run.yaml").write_text(
        """
        model: t5-small
        tokenizer: t5-tok
        architecture: {d_model: 16, n_layers: 1, n_heads: 2, d_head: 8, d_ff: 24}
        objective: seq2seq
        data:
          tasks:
            there: {train: docs.jsonl, validation: docs.jsonl, prefix: "to Korean: ", source: en, target: ko}
            back: {train: docs.jsonl, prefix: "to English: ", source: ko, target: en}
          length: 64
          rows: 2
        steps: 2
        out: run
        device: cpu
        """
    )
    ran = cli("train", "run.yaml", "--json")
    assert ran.code == 0, ran.err
    assert "12 documents" in ran.err
    assert json.loads(ran.out)["evaluation"]["targets"] > 0
    assert "train: give a file to train on, or tasks" in cli("train", "run.yaml", "data=docs.jsonl", "out=2").err
    assert "tasks.back.prefiks" in cli("train", "run.yaml", "data.tasks.back.prefiks=x", "out=2").err


def test_bits_per_byte_are_the_loss_spread_over_the_text(cli: Callable, here: Path):
    assert cli("train", "gpt2", *WORDS, "steps=2", "--data", "text.txt", "--out", "one").code == 0
    ran = cli("evaluate", "one/checkpoints/last", "data.length=64", "--data", "text.txt", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    tokenizer = lathe.load("one/checkpoints/last").tokenizer
    assert tokenizer is not None
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in TEXT)  # and the end mark
    n_bytes = sum(len(text.encode()) for text in TEXT)
    assert found["bytes"] == n_bytes
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * tokens / math.log(2) / n_bytes)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert "give --data FILE" in cli("evaluate", "one/checkpoints/last").err


BAD = {
    "an unknown key": (["stepz=3"], "unknown key 'stepz'"),
    "an unknown nested key": (["optimizer.rate=3"], "unknown field 'optimizer.rate'"),
    "an unknown size": (["decoder.width=3"], "unknown field 'decoder.width'"),
    "a bare value for a group": (["optimizer=adamw"], "expected fields of OptimizerSettings"),
    "an unknown objective": (["objective=casual"], "did you mean 'causal'?"),
    "another shape's objective": (["objective=masked"], "the objective masked"),
    "an unknown setting of the objective": (["objective.share=0.2"], "share"),
    "no budget": (["steps=none"], "the run has no end"),
    "an empty file": (["data.train=empty.txt"], "holds no record"),
    "a missing file": (["data.train=nowhere.txt"], "nowhere.txt"),
    "rows longer than the positions": (["data.length=512"], "positions"),
    "a tokenizer that does not fit": (["vocab_size=50"], "the tokenizer has"),
    "a device that is not here": (["device=cuda:99"], "there is no such device here"),
    "a file under both of its keys": (["data=text.txt"], "data.train and data are the same key"),
    "a name under both of its keys": (["objective.name=causal"], "objective and objective.name are the same key"),
    "adafactor's missing beta": (["optimizer.kind=adafactor", "optimizer.beta1=0.5"], "adafactor has no beta1"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(cli: Callable, here: Path, what: str):
    (here / "empty.txt").touch()
    # Long enough that a row of 512 would be needed.
    (here / "long.txt").write_text(" ".join(TEXT * 9), encoding="utf-8")
    words, line = BAD[what]
    given = {word.partition("=")[0]: word for word in [*WORDS, "steps=2", "data.train=long.txt", "out=run", *words]}
    ran = cli("train", "gpt2", *given.values())
    assert ran.code == 2, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("lathe: ")
    assert line in last
    assert not (here / "run").exists()


def test_a_run_file_that_cannot_be_read_is_named(cli: Callable, here: Path):
    (here / "broken.yaml").write_text("steps: [1\nmodel: gpt2")
    assert "broken.yaml is not YAML (line 2)" in cli("train", "broken.yaml").err
    (here / "odd.yaml").write_text("model: gpt2\x07")
    assert "odd.yaml is not YAML" in cli("train", "odd.yaml").err
    (here / "empty.yaml").touch()
    assert "holds no keys" in cli("train", "empty.yaml").err
    assert "there is no run file missing.yaml" in cli("train", "missing.yaml").err


def test_validation_data_that_does_not_fit_is_found_before_the_first_step(cli: Callable, here: Path):
    train_tokenizer(TEXT, 300, convention="bart").save(here / "bart-tok")
    for name, source in (("short", "wood"), ("long", " ".join(TEXT[:4]))):
        (here / f"{name}.jsonl").write_text((json.dumps({"a": source, "b": "metal"}) + "\n") * 6)
    words = ["objective=seq2seq", "objective.max_source=256", "tokenizer=bart-tok", "data.length=256", "data.rows=2"]
    words += ["data.fields.source=a", "data.fields.target=b", "steps=2", *SIZES[:-1], "max_positions=32", "device=cpu"]
    files = ["--data", "short.jsonl", "--validation"]
    refused = cli("train", "bart-base", *words, *files, "long.jsonl", "--out", "run")
    assert (refused.code, "data.validation: a sample takes " in refused.err) == (2, True), refused.err
    assert not Path("run").exists()
    # The length that was given for the decoder's rows is the validation's too.
    (here / "wordy.jsonl").write_text(json.dumps({"a": "wood", "b": " ".join(TEXT[:2])}) + "\n")
    wide = cli("train", "bart-base", *words, *files, "wordy.jsonl", "--out", "run", "data.target_length=24")
    assert (wide.code, "data.validation: target_length=24: a sample takes " in wide.err) == (2, True), wide.err
