"""Healing: a cut model comes nearer to its parent, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.reshape.heal import HealSettings, heal
from lathe.reshape.stages import half_way
from lathe.reshape.text import TextSettings, endless, lay, read_documents
from lathe.text.train import train_tokenizer
from lathe.train import Distillation, evaluate


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[lathe.Model, Path]:
    """A small GPT-2 that has learnt a little, and its text."""
    chance = random.Random(0)
    words = ["a", "lathe", "turns", "wood", "metal", "stone", "to", "the", "size", "asked", "for"]
    file = tmp_path_factory.mktemp("heal") / "text.txt"
    file.write_text("\n".join(" ".join(chance.choices(words, k=30)) for _ in range(40)), encoding="utf-8")
    tokenizer = train_tokenizer(file.read_text(encoding="utf-8").splitlines(), 280, convention="gpt2")
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id}
    architecture = lathe.preset("gpt2").with_({**sizes, **tokens, "vocab_size": tokenizer.vocab_size})
    model = lathe.Model(architecture, seed=0, tokenizer=tokenizer)
    lathe.heal(model, model, file, steps=20, lr=2e-2, weight=0.0, rows=4, length=32)
    return model, file


def batches(model: lathe.Model, settings: TextSettings) -> Any:
    assert model.tokenizer is not None
    documents, _ = read_documents(settings, model.tokenizer, apart=False)
    return endless(documents, settings, model.architecture, model.tokenizer)


def test_a_cut_model_comes_nearer_to_its_parent(parent: tuple[lathe.Model, Path]):
    model, file = parent
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = lathe.resize(model, d_model=8, calibrate=file, refit=False)  # fitted, there is little left to heal
    assert small.tokenizer is model.tokenizer
    text = batches(model, TextSettings(file=str(file), rows=4, length=32)).one_pass(4)
    distance = Distillation(model, weight=1.0)
    before = evaluate(small, text, loss_fn=distance).loss
    lathe.heal(small, model, file, steps=12, lr=5e-3, rows=4, length=32, weight=1.0)
    assert evaluate(small, text, loss_fn=distance).loss < 0.9 * before
    assert not small.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(parent: tuple[lathe.Model, Path], tmp_path: Path):
    model, file = parent
    settings = HealSettings(file=str(file), steps=6, rows=2, length=32, save_every=2, hidden=0.1)

    class Stopped(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 5:
            raise Stopped

    whole, broken, resumed = (lathe.resize(model, method="truncate", d_model=8) for _ in range(3))
    heal(whole, model, batches(model, settings.text), settings)
    with pytest.raises(Stopped):
        heal(broken, model, batches(model, settings.text), settings, tmp_path / "run", on_step=stop)
    heal(resumed, model, batches(model, settings.text), settings, tmp_path / "run")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    other = lathe.resize(model, method="truncate", d_model=8)
    with pytest.raises(RequestError, match="was started with"):
        heal(other, model, batches(model, settings.text), settings, tmp_path / "run", asked={"cut": "another"})


def test_a_grown_model_shares_no_memory_with_the_one_it_came_from(parent: tuple[lathe.Model, Path]):
    model, _ = parent
    grown = lathe.resize(model, d_ff=32)
    taken = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert taken.isdisjoint(tensor.data_ptr() for tensor in grown.state_dict().values())


def test_half_of_the_way_is_a_size_that_the_family_can_hold():
    base = lathe.preset("bert-base-uncased", head="masked")
    assert half_way(base, {"d_model": 480}) is None
    first = half_way(base, {"d_model": 192, "d_ff": 2048})
    assert first is not None
    assert first["d_ff" if "d_ff" in first else "encoder.feed_forward.d_ff"] == 2048
    assert first["d_model"] == 384
    assert half_way(lathe.preset("t5-small"), {"encoder.n_layers": 2}) == {"encoder.n_layers": 3}


def test_text_is_drawn_by_its_seed_and_kept_apart(parent: tuple[lathe.Model, Path]):
    model, file = parent
    assert model.tokenizer is not None
    settings = TextSettings(file=str(file), tokens=600)
    used, held = read_documents(settings, model.tokenizer, apart=True)
    assert held
    assert not set(used.texts) & set(held.texts)
    assert used.digest == read_documents(settings, model.tokenizer, apart=True)[0].digest
    other, _ = read_documents(TextSettings(file=str(file), tokens=600, seed=1), model.tokenizer, apart=True)
    assert other.digest != used.digest
    text = lay(used, settings, model.architecture, model.tokenizer)
    assert text.tokens == pytest.approx(600, rel=0.1)
    assert text.length == 64
    assert text.targets_of_text is not None


def test_one_long_document_is_divided(parent: tuple[lathe.Model, Path], tmp_path: Path):
    model, file = parent
    assert model.tokenizer is not None
    long = tmp_path / "long.txt"
    long.write_text(file.read_text(encoding="utf-8").replace("\n", " "), encoding="utf-8")
    used, held = read_documents(TextSettings(file=str(long), tokens=500), model.tokenizer, apart=True)
    tokens = [sum(map(len, model.tokenizer.encode_batch(list(each.texts)))) for each in (used, held)]
    assert sum(tokens) == pytest.approx(500, rel=0.1)
    assert tokens[0] > 5 * tokens[1] > 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"weight": 2.0}, "expected the parent's share"),
        ({"lr": 0}, "expected more than 0"),
        ({"speed": 1}, "unknown field 'speed'"),
        ({"hidden": -1.0}, "expected 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(parent: tuple[lathe.Model, Path], settings: dict[str, Any], line: str):
    model, file = parent
    with pytest.raises(RequestError, match=line):
        lathe.heal(model, model, file, **settings)
    with pytest.raises(RequestError, match="has no tokenizer"):
        lathe.resize(lathe.Model(model.architecture, seed=0), d_model=8, calibrate=file)
