"""`lathe quantize`: the directory is whole and says what it cost, and what is wrong is one line."""

from __future__ import annotations

import errno
import json
import random
import shlex
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lathe
from lathe.data import Batches, Corpus
from lathe.data.tokenise import special_tokens
from lathe.objectives import Masked
from lathe.quantization import is_quantized
from lathe.text.train import train_tokenizer
from lathe.train import OptimizerSettings, TrainSettings, train

WORDS = ["the", "a", "lathe", "turns", "wood", "metal", "stone", "to", "size", "that", "is", "asked", "for", "and"]
SIZES: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_head": 16, "d_ff": 48, "max_positions": 32}


def documents(number: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(20, 30))) for _ in range(number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, and text."""
    folder = tmp_path_factory.mktemp("quantize")
    for name, number, seed in (("text.txt", 40, 0), ("held.txt", 10, 1), ("short.txt", 1, 2)):
        (folder / name).write_text("\n".join(documents(number, seed)), encoding="utf-8")
    tokenizer = train_tokenizer(documents(40, 0), 60, convention="bert")
    base = lathe.preset("bert-base-uncased", head="masked")
    tokens = {**base.tokens.to_dict(), "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    architecture = base.with_({**SIZES, "vocab_size": tokenizer.vocab_size, "tokens": tokens})
    model = lathe.Model(architecture, seed=0, tokenizer=tokenizer)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=drawn)
    # Trained, so that whatever moves it away costs something.
    masked = Masked(special=special_tokens(tokenizer, architecture))
    ids = [list(each) for each in tokenizer.encode_batch(documents(200, 3), add_special_tokens=False)]
    batches = Batches(Corpus.of(tokenizer.vocab_size, text=ids), masked, length=32, rows=16)
    train(model, batches, TrainSettings(steps=80, optimizer=OptimizerSettings(lr=3e-3), dropout=0.0))
    # One channel of a head is written small and read large. That computes the same and spoils a row's scales.
    with torch.no_grad():
        for layer in range(SIZES["n_layers"]):
            path = f"encoder.attention.{layer}"
            model.get_parameter(f"{path}.v.weight")[0] /= 40
            model.get_parameter(f"{path}.v.bias")[0] /= 40
            model.get_parameter(f"{path}.o.weight")[:, 0] *= 40
    model.save(folder / "bert")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the model and the text in it."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_the_result_is_a_stock_directory_with_its_recipe_its_page_and_its_card(cli: Callable, here: Path):
    ran = cli("quantize", "bert", "q", "--bits", "4", "--calibrate", "text.txt", "--data", "held.txt", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["result"]["bytes"] < 0.5 * answer["source"]["bytes"]
    assert answer["settings"]["method"] == "gptq"
    assert answer["loss_change"] == answer["result"]["quality"]["loss"] / answer["source"]["quality"]["loss"] - 1
    assert answer["reload"]["largest"] == 0
    assert answer["reload"]["stock"] < 1e-4
    assert answer["reload"]["missing"] == answer["reload"]["unexpected"] == []
    errors = [layer["error"] for layer in answer["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 0.5
    assert answer["kept"] == []
    assert lathe.load("q").tokenizer is not None
    recipe = json.loads(Path("q/lathe.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["stages"] == [{"quantize": answer["settings"]}]
    assert recipe["calibrate"]["file"] == "text.txt"
    card, page = (Path("q", name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["lathe", "quantized", "bert"]
    for part in (answer["layers"][0]["name"], "held.txt"):
        assert part in card
        assert part in page


def test_the_page_and_the_card_say_the_command_that_makes_the_same_bytes(cli: Callable, here: Path):
    (here / "my model (2)").symlink_to(here / "bert")
    for name in ("text", "held"):
        rows = ["n\tsaid\n", *(f"{n}\t{line}\n" for n, line in enumerate(Path(f"{name}.txt").read_text().splitlines()))]
        (here / f"the {name}.tsv").write_text("".join(rows), encoding="utf-8")
    words = ["--bits", "4", "--keep", "*.down", "--calibrate", "the text.tsv", "calibrate.field=said", "seed=7"]
    words += [
        "calibrate.tokens=600",
        "--data",
        "the held.tsv",
        "data.field=said",
        "objective=masked",
        "objective.rate=0.3",
    ]
    ran = cli("quantize", "my model (2)", "q", *words)
    assert ran.code == 0, ran.err
    page = unescape(Path("q/report.html").read_text(encoding="utf-8"))
    command = page[page.index("lathe quantize ") :].split("<")[0].strip()
    assert command in Path("q/README.md").read_text(encoding="utf-8")
    again = cli(*shlex.split(command.replace(" NEW ", " again "))[1:])
    assert again.code == 0, again.err
    assert Path("again/model.safetensors").read_bytes() == Path("q/model.safetensors").read_bytes()
    assert command in unescape(Path("again/report.html").read_text(encoding="utf-8"))


def test_layers_that_hurt_are_proposed_and_keeping_them_wins_what_was_said(cli: Callable, here: Path):
    words = ("--bits", "4", "--data", "held.txt", "--json")
    first = json.loads(cli("quantize", "bert", "all", *words).out)
    assert first["loss_change"] > 0
    best = first["proposals"][0]
    assert best["gain"] > 0
    kept = json.loads(cli("quantize", "bert", "some", *words, "--keep", best["name"]).out)
    assert kept["kept"] == [best["name"]]
    won = first["result"]["quality"]["loss"] - kept["result"]["quality"]["loss"]
    assert won == pytest.approx(best["gain"], rel=1e-3)


def test_without_text_it_says_that_nothing_was_measured(cli: Callable, here: Path):
    ran = cli("quantize", "bert", "q")
    assert ran.code == 0, ran.err
    assert "No loss was measured" in ran.out
    assert "int8 activations" in Path("q/README.md").read_text(encoding="utf-8")


def test_a_classifier_has_no_loss_on_text_and_keeps_none_apart(cli: Callable, here: Path):
    base = lathe.load("bert")
    shape = base.architecture.with_({"head": lathe.preset("bert-base-uncased", "classification").head.to_dict()})
    tensors = base.tensors()
    drawn = lathe.Model(shape, seed=0).tensors()
    kept = {name: tensors.get(name, tensor) for name, tensor in drawn.items()}
    lathe.Model(shape, kept, tokenizer=base.tokenizer).save("classifier")
    for given, says in (("--data", "held.txt"), ("--calibrate", "text.txt")):
        ran = cli("quantize", "classifier", f"q{given}", given, says)
        assert ran.code == 0, ran.err
        assert "The loss was not measured: this model predicts no tokens; lathe evaluate measures" in ran.out
        assert "measured on" not in Path(f"q{given}", "README.md").read_text(encoding="utf-8")
    assert "codes chosen on: text.txt: 40 documents" in Path("q--calibrate/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("bert", "q", "--bits", "5"), "bits=5: expected one of 8, 4"),
        (("bert", "q", "--bits", "4", "--method", "gptq"), "give --calibrate FILE"),
        (("bert", "q", "--keep", "decoder.atention"), "matches no layer that is quantised"),
        (("bert", "q", "--calibrate", "short.txt", "--bits", "4", "--data", "held.txt"), "expected 512 or more"),
        (("bert", "q", "--calibrate", "missing.txt"), "missing.txt"),
        (("bert", "bert"), "already exists"),
        (("./nowhere", "q"), "nowhere"),
        (("bert", "q", "d_model=3"), "d_model=3: expected calibrate"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(cli: Callable, here: Path, words: tuple[str, ...], says: str):
    ran = cli("quantize", *words)
    assert ran.code == 2
    assert says in ran.err.splitlines()[-1]
    assert not Path("q").exists()
    assert not list(here.glob(".lathe-*"))


def test_a_quantised_source_is_refused_everywhere_in_one_line(cli: Callable, here: Path):
    assert cli("quantize", "bert", "q").code == 0
    for words in (
        ("quantize", "q", "again"),
        ("resize", "q", "again", "d_ff=32", "--calibrate", "text.txt"),
        ("plan", "q"),
        ("train", "./q", "objective=masked", "data.train=text.txt", "out=again", "steps=1", "data.cache=none"),
    ):
        ran = cli(*words)
        assert ran.code == 2, words
        assert "quantised already" in ran.err, ran.err
        assert ran.err.strip().splitlines()[-1].startswith("lathe: ")
    assert not Path("again").exists()


def test_it_is_compared_with_the_model_that_it_was(cli: Callable, here: Path):
    assert cli("quantize", "bert", "q").code == 0
    ran = cli("compare", "bert", "q", "--data", "held.txt", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    before, after = json.loads(ran.out)["rows"]
    assert after["bytes"] < 0.5 * before["bytes"]
    assert after["loss"] == pytest.approx(before["loss"], rel=0.05)


def test_a_full_disk_leaves_nothing(cli: Callable, here: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lathe.checkpoint.tensors._write_file", full)
    ran = cli("quantize", "bert", "q")
    assert ran.code == 1
    assert len(ran.err.strip().splitlines()[-1:]) == 1
    assert "disk is full" in ran.err or "No space left" in ran.err
    assert not Path("q").exists()
    assert not list(here.glob(".lathe-*"))


def test_an_adapter_trains_over_a_quantised_base(cli: Callable, here: Path):
    assert cli("quantize", "bert", "q").code == 0
    data = ("data.train=text.txt", "data.length=16", "data.rows=4", "data.cache=none")
    ran = cli("train", "./q", "objective=masked", *data, "adapter.rank=2", "steps=2", "device=cpu", "out=run")
    assert ran.code == 0, ran.err
    assert is_quantized(lathe.load("run/checkpoints/last"))
    ran = cli("evaluate", "q", "--data", "held.txt", "objective=masked", "data.length=16", "--json")
    assert ran.code == 0, ran.err


def test_a_model_whose_weights_are_bfloat16_is_measured_and_trained_over_when_quantised(cli: Callable, here: Path):
    lathe.load("bert", dtype=torch.bfloat16).save("half")
    assert cli("quantize", "half", "q", "--bits", "4").code == 0
    data = ("data.length=16", "data.rows=4", "data.cache=none", "objective=masked", "device=cpu")
    ran = cli("evaluate", "q", "--data", "held.txt", *data, "--json")
    assert ran.code == 0, ran.err
    train = (*data, "data.train=text.txt", "adapter.rank=2", "steps=1", "out=run")
    assert cli("train", "./q", *train).code == 0
    ran = cli("evaluate", "run/checkpoints/last", "--data", "held.txt", *data, "--json")
    assert ran.code == 0, ran.err
