"""Runs that train an adapter: small checkpoints that PEFT opens, exact resume, evaluation, merging, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lathe
from lathe.adapt import save_adapter
from lathe.adapt.opening import base_of, is_adapter, open_adapted
from lathe.errors import RequestError
from lathe.text.train import train_tokenizer
from lathe.train.job import open_job
from lathe.train.request import read_request

TEXT = ["the quick brown fox jumps over the lazy dog", "a lathe turns wood and metal to the size that is asked for"] * 9
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def base(folder: Path, preset: str, head: str | None, vocab_size: int) -> None:
    """A model that stands for a trained one, with its tokenizer."""
    tokenizer = train_tokenizer(TEXT, vocab_size, convention="gpt2" if preset == "gpt2" else "bert")
    tokens: dict[str, Any] = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "mask": tokenizer.mask_id}
    tokens["eos"] = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    shape = lathe.preset(preset, head).with_({**SIZES, "vocab_size": tokenizer.vocab_size, "tokens": tokens})
    lathe.Model(shape, seed=7, tokenizer=tokenizer).save(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapting")
    base(folder / "gpt2", "gpt2", None, 300)
    base(folder / "bert", "bert-base-uncased", "masked", 90)
    (folder / "text.txt").write_text("\n".join(TEXT), encoding="utf-8")
    rows = "".join(f"{'good fox' if i % 2 else 'bad dog'}\t{i % 2}\n" for i in range(24))
    (folder / "reviews.tsv").write_text("text\tlabel\n" + rows)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


DATA = ["data.train=text.txt", "data.length=32", "data.rows=4", "device=cpu", "data.cache=none"]
LORA = [*DATA, "objective=causal", "optimizer.lr=2e-2", "adapter.rank=2", "adapter.targets=heads,ffn"]


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_an_adapter_that_opens_everywhere_and_a_base_as_it_was(cli: Callable, here: Path, made: Path):
    before = digest(made / "gpt2")
    ran = cli("train", "gpt2", *LORA, "steps=6", "evaluate_every=3", "data.validation=text.txt", "out=run")
    # A preset's name goes before a directory's: new weights have nothing to adapt.
    assert ran.code == 2
    ran = cli("train", "./gpt2", *LORA, "steps=6", "evaluate_every=3", "data.validation=text.txt", "out=run", "--json")
    assert ran.code == 0, ran.err
    assert "parameters of an adapter on" in ran.err
    last = Path(json.loads(ran.out)["model"])
    assert digest(made / "gpt2") == before
    assert not (last / "model.safetensors").exists()
    assert is_adapter(last)
    assert base_of(last) == str(here / "gpt2")  # from wherever it is opened
    weights = Path("gpt2/model.safetensors").stat().st_size
    assert (last / "adapter_model.safetensors").stat().st_size < weights / 2

    found = [
        json.loads(cli("evaluate", *model, *DATA[:3], "data.cache=none", "--json").out)["loss"]
        for model in (["./gpt2"], ["./gpt2", "--adapter", str(last)], [str(last)])
    ]
    assert found[1] == found[2] < found[0]
    line = json.loads((here / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["evaluation"]["loss"] == pytest.approx(found[1], rel=1e-5)

    assert cli("adapt", "merge", "./gpt2", str(last), "merged", "--json").code == 0
    model, _ = open_adapted("./gpt2", last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = transformers.AutoModelForCausalLM.from_pretrained("./gpt2")
        theirs = peft.PeftModel.from_pretrained(stock, str(last)).eval()
        whole = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    with torch.no_grad():
        ours = model(IDS).logits
        torch.testing.assert_close(theirs(IDS).logits, ours, atol=1e-4, rtol=0)
        torch.testing.assert_close(whole(IDS).logits, ours, atol=1e-4, rtol=0)
        loaded = lathe.load(last)
        assert torch.equal(loaded(IDS).logits, ours)
        assert torch.equal(loaded.to_transformers()(IDS).logits, whole(IDS).logits)
    with pytest.raises(RequestError, match="revision=main"):
        lathe.load(last, revision="main")
    texts = [
        cli("generate", *model, "--prompt", "the lazy", "--max-new-tokens", "5", "--greedy").out
        for model in (["./gpt2", "--adapter", str(last)], [str(last)], ["merged"])
    ]
    assert texts[0] == texts[1] == texts[2] != ""


def test_a_new_head_is_trained_whole_and_travels_with_the_adapter(cli: Callable, here: Path):
    task = ["objective=classification", "steps=80", "optimizer.lr=1e-2", "dropout=0.0", "head=classification"]
    data = [*DATA, "data.train=reviews.tsv"][1:]
    ran = cli("train", "./bert", *data, *task, "adapter.rank=2", "adapter.targets=heads,ffn", "out=run", "--json")
    assert ran.code == 0, ran.err
    last = json.loads(ran.out)["model"]
    config = json.loads((here / last / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"classifier", "pooler"}
    assert config["task_type"] == "SEQ_CLS"
    found = json.loads(cli("evaluate", last, "data=reviews.tsv", "data.cache=none", "--json").out)
    assert found["accuracy"] == 1.0
    same = cli("evaluate", "./bert", "--adapter", last, "data=reviews.tsv", "data.cache=none", "--json")
    assert json.loads(same.out)["loss"] == found["loss"]
    assert cli("adapt", "merge", "./bert", last, "merged").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = transformers.BertForSequenceClassification.from_pretrained("./bert")
        theirs = peft.PeftModel.from_pretrained(stock, last).eval()
        whole = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    model, _ = open_adapted("./bert", last)
    with torch.no_grad():
        ours = model(IDS).logits
        torch.testing.assert_close(theirs(IDS).logits, ours, atol=1e-4, rtol=0)
        torch.testing.assert_close(whole(IDS).logits, ours, atol=1e-4, rtol=0)
    (here / last / "head.json").unlink()
    assert "belongs to no linear layer of this model" in cli("evaluate", last, "data=reviews.tsv").err


def test_an_adapter_that_was_opened_and_saved_again_opens(cli: Callable, here: Path):
    task = ["objective=classification", "steps=2", "head=classification", "adapter.rank=2", "out=run"]
    assert cli("train", "./bert", *DATA[1:], "data.train=reviews.tsv", *task).code == 0
    model = lathe.load("run/checkpoints/last")
    save_adapter(model, here / "again", base_model=str(here / "bert"))
    with torch.no_grad():
        assert torch.equal(lathe.load("again")(IDS).logits, model(IDS).logits)


def test_a_new_head_is_trained_on_a_quantised_base_and_opens_there(cli: Callable, here: Path):
    assert cli("quantize", "./bert", "small").code == 0
    task = ["objective=classification", "steps=2", "head=classification", "adapter.rank=2", "out=run"]
    ran = cli("train", "./small", *DATA[1:], "data.train=reviews.tsv", *task)
    assert ran.code == 0, ran.err
    found = cli("evaluate", "run/checkpoints/last", "data=reviews.tsv", "data.cache=none", "--json")
    assert found.code == 0, found.err
    assert 0 < json.loads(found.out)["loss"] < 5


def test_what_layers_keep_of_themselves_is_trained_on_and_opens(cli: Callable, here: Path):
    """`remainder` gives each layer that shares its weights a part of its own: an adapter on unshared layers."""
    made = cli("resize", "./bert", "shared", "sharing=all", "remainder=2", "--own-form")
    assert made.code == 0, made.err
    ran = cli("train", "shared/remainder", *DATA, "objective=masked", "steps=2", "out=run")
    assert ran.code == 0, ran.err
    base, last = str(here / "shared"), "run/checkpoints/last"
    assert base_of(last) == base
    asked = ("data=text.txt", "objective=masked", "--json")
    found = [cli("evaluate", *words, *asked) for words in ([last], [base, "--adapter", last])]
    assert [each.code for each in found] == [0, 0], found[0].err
    assert json.loads(found[0].out)["loss"] == json.loads(found[1].out)["loss"]


def run(out: str, kind: dict[str, Any], *, resume: bool = False, stop: int | None = None) -> None:
    """Train, and be interrupted after a step."""
    tree = {
        "model": "./gpt2",
        "objective": {"name": "causal"},
        "data": {"train": "text.txt", "validation": "text.txt", "length": 32, "rows": 2, "cache": None},
        "adapter": {"rank": 2, "dropout": 0.2, "targets": "reader,writer", **kind},
        "steps": 6,
        "evaluate_every": 2,
        "optimizer": {"lr": 1e-2},
        "save": {"every": 2},
        "device": "cpu",
        "out": out,
    }

    def after(report: Any) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    open_job(read_request(tree, {})).run(resume=resume, on_step=after)


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
def test_an_interrupted_run_ends_as_one_that_was_not(here: Path, kind: dict[str, Any]):
    run("whole", kind)
    with pytest.raises(KeyboardInterrupt):
        run("cut", kind, stop=3)
    run("cut", kind, resume=True)
    one, other = (here / name for name in ("cut", "whole"))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for part in ("trained/model", "optimizer/model", "adapter_model"):
        wanted, found = (load_file(each / f"checkpoints/last/{part}.safetensors") for each in (other, one))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    trained = load_file(other / "checkpoints/last/trained/model.safetensors")
    assert all(".adapters.default." in name for name in trained)
    moments = load_file(other / "checkpoints/last/optimizer/model.safetensors")
    assert {name.rpartition(":")[0] for name in moments} == trained.keys()


def test_training_goes_on_from_an_adapter(cli: Callable, here: Path, made: Path):
    first = cli("train", "./gpt2", *LORA, "steps=6", "out=first", "--json")
    last = json.loads(first.out)["model"]
    words = [last, *DATA, "objective=causal", "optimizer.lr=2e-2", "steps=6", "--json"]
    done = cli("train", *words, "out=second")
    assert done.code == 0, done.err
    assert "parameters of an adapter on" in done.err
    lines = [(here / f"{name}/metrics.jsonl").read_text().splitlines()[0] for name in ("first", "second")]
    start, again = (json.loads(line)["loss"] for line in lines)
    assert again < start  # the same batch, read by what the first run left
    second = json.loads(done.out)["model"]
    assert base_of(second) == str(here / "gpt2")
    before, after = (json.loads((Path(each) / "adapter_config.json").read_text()) for each in (last, second))
    assert before == after
    old, new = (load_file(Path(each) / "adapter_model.safetensors") for each in (last, second))
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)
    # An interrupted run goes on from its own checkpoint, and only with the adapter that it started from.
    assert cli("train", *words, "out=third", "save.every=3").code == 0
    assert json.loads(cli("train", *words, "out=third", "save.every=3", "--resume").out)["step"] == 6
    shutil.rmtree(here / "first/checkpoints")
    cli("train", "./gpt2", *LORA, "steps=6", "seed=5", "out=other", "--json")
    shutil.copytree(here / "other/checkpoints", here / "first/checkpoints", symlinks=True)
    assert "was started with base_weights=" in cli("train", *words, "out=third", "save.every=3", "--resume").err


def test_a_run_killed_at_random_instants_ends_as_one_that_was_not(here: Path):
    program = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(program), str(here), "1", "6", "40", "adapter"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [9] * 6 + [0, 0], done.stderr
    one, other = (here / name for name in ("run", "whole"))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for part in ("trained/model", "optimizer/model", "adapter_model"):
        wanted, found = (load_file(each / f"checkpoints/last/{part}.safetensors") for each in (other, one))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_resume_with_another_adapter_or_another_base_is_refused(cli: Callable, here: Path, made: Path):
    words = ["objective=causal", "steps=2", "out=run", *DATA]
    lathe.load(made / "gpt2").save(here / "mine")
    lathe_words = ["adapter.rank=2", "adapter.targets=ffn"]
    assert cli("train", "./mine", *words, *lathe_words).code == 0
    assert "finished already" in cli("train", "./mine", *words, *lathe_words, "--resume").out
    other = cli("train", "./mine", *words, "adapter.rank=4", "adapter.targets=ffn", "--resume")
    assert "was started with adapter.rank=2 and this one says 4" in other.err
    assert "was started with adapter=" in cli("train", "./mine", *words, "--resume").err
    model = lathe.load(here / "mine")
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save(here / "mine", replace=True)
    assert "was started with base_weights=" in cli("train", "./mine", *words, *lathe_words, "--resume").err


def test_the_dropout_of_a_run_is_not_the_adapters(here: Path):
    tree = {
        "model": "./gpt2",
        "objective": {"name": "causal"},
        "data": {"train": "text.txt", "length": 32, "cache": None},
        "steps": 1,
        "optimizer": {"lr": 1e-2},
        "device": "cpu",
        "dropout": 0.0,
    }
    losses = []
    for number, dropout in enumerate((0.0, 0.9)):
        request = read_request(tree, {"adapter.dropout": dropout, "out": f"run{number}", "steps": 3})
        losses.append(open_job(request).run().losses)
    assert losses[0][0] == losses[1][0]  # an untrained adapter adds nothing, dropped or not
    assert losses[0][2] != losses[1][2]


REFUSED = {
    "a layer that is not there": (["adapter.targets=*.nothing"], "targets='*.nothing' matches no linear layer"),
    "a rank that is too large": (["adapter.rank=99"], "rank=99 is larger than the layer"),
    "an unknown setting": (["adapter.ranks=9"], "unknown field 'adapter.ranks'"),
    "a bare value": (["adapter=lora"], "expected fields of LoraSettings"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_line_and_nothing_is_written(cli: Callable, here: Path, what: str):
    words, line = REFUSED[what]
    given = {word.partition("=")[0]: word for word in [*LORA, "steps=2", "out=run", *words]}
    if what == "a bare value":
        given = {key: word for key, word in given.items() if not key.startswith("adapter.")}
    ran = cli("train", "./gpt2", *given.values())
    assert ran.code == 2, ran.err
    assert line in ran.err.splitlines()[-1]
    assert not (here / "run").exists()


def test_models_and_adapters_are_not_taken_for_each_other(cli: Callable, here: Path):
    run("lora", {})
    last = "lora/checkpoints/last"
    ran = cli("train", last, *LORA, "steps=1", "out=again")
    assert "is an adapter, and training goes on with it as it is: leave adapter out" in ran.err
    assert (
        "d_ff=9: the adapter lora/checkpoints/last is for one base and one head"
        in cli("train", last, *DATA, "objective=causal", "steps=1", "out=again", "d_ff=9").err
    )
    assert not (here / "again").exists()
    new = cli("train", "gpt2", *LORA, "steps=1", "out=again", "tokenizer=gpt2/")
    assert "an adapter is for a model that is trained" in new.err
    assert "holds no adapter_config.json" in cli("evaluate", "./gpt2", "--adapter", "bert", "data=text.txt").err
    assert "is an adapter and no model" in cli("evaluate", last, "--adapter", last, "data=text.txt").err
    assert "is an adapter and no model" in cli("generate", last, "--adapter", last, "--prompt", "a").err
    wrong = cli("adapt", "merge", "./bert", last, "merged")
    assert wrong.code == 2
    assert not (here / "merged").exists()
    assert "gpt2 exists" in cli("adapt", "merge", "./gpt2", last, "gpt2").err
    assert not (here / "again").exists()
    config = here / last / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "./gone"}))
    moved = cli("generate", last, "--prompt", "a")
    assert moved.code == 2
    assert "was trained on ./gone, which is not here: give the base as the model" in moved.err
    config.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    with pytest.raises(RequestError, match="names no base: give the base as the model"):
        base_of(last)
