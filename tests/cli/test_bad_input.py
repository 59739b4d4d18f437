"""What users get wrong, through the command line: one clear line, exit 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

import lathe
from lathe.text.train import train_tokenizer

TEXT = [line for name in ("assert", "booleans", "class", "for") for line in topics[name].splitlines() if line]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock T5 with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "good"
    tokenizer = train_tokenizer(TEXT, 420, sentinels=4)
    tiny = lathe.preset("t5-small").with_(
        d_model=16, d_ff=24, n_layers=1, n_heads=2, d_head=4, vocab_size=tokenizer.vocab_size
    )
    lathe.Model(tiny, seed=0, tokenizer=tokenizer).save(folder)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def with_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("no weights", lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    ("no config", lambda m: (m / "config.json").unlink(), "holds neither config.json nor lathe.json"),
    ("a truncated file", truncate, "model.safetensors"),
    ("a config that is no JSON", lambda m: (m / "config.json").write_text("{"), "is not JSON"),
    ("an unknown family", lambda m: edit(m, model_type="t6"), "unknown model_type 't6'"),
    ("no family", lambda m: edit(m, model_type=None), "has no model_type"),
    ("an unknown class", lambda m: edit(m, architectures=["T5ForJuggling"]), "unknown class 'T5ForJuggling'"),
    ("a config that contradicts its tensors", lambda m: edit(m, d_ff=32), "the two belong to different models"),
    ("a layer too many in the config", lambda m: edit(m, num_layers=2), "is missing"),
    (
        "a tensor too many",
        lambda m: with_tensors(m, lambda t: t.update({"decoder.extra.weight": torch.zeros(2)})),
        "'decoder.extra.weight' belongs to no parameter",
    ),
    (
        "a tensor too few",
        lambda m: with_tensors(m, lambda t: t.pop("encoder.final_layer_norm.weight")),
        "'encoder.final_layer_norm.weight' is missing",
    ),
    ("a width of 0", lambda m: edit(m, d_model=0), "d_model=0"),
    ("a negative width", lambda m: edit(m, d_model=-1), "d_model=-1"),
    ("a width that is no number", lambda m: edit(m, d_model="abc"), "d_model='abc'"),
    ("an enormous width", lambda m: edit(m, d_model=10**9), "d_model=1000000000"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_model_is_one_line(cli: Any, model: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(model)
    before = sorted(path.name for path in model.iterdir())
    ran = cli("generate", model, "--prompt", "the quick")
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(path.name for path in model.iterdir()) == before


def test_the_undamaged_model_generates(cli: Any, good: Path) -> None:
    ran = cli("generate", good, "--prompt", "the quick", "--max-new-tokens", "3", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)


def test_an_adapter_where_a_model_is_wanted_is_named(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for words in (("plan", tmp_path), ("quantize", tmp_path, tmp_path / "q", "--bits", "8")):
        ran = cli(*words)
        assert (ran.code, ran.out) == (2, "")
        assert "is an adapter and no model: expected a model's directory; fold it into its base first" in ran.err
        assert ran.err.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "abc", "1000000000"])
def test_a_width_that_cannot_be_is_one_line(cli: Any, value: str) -> None:
    ran = cli("plan", "t5-small", f"d_model={value}")
    assert (ran.code, ran.out) == (2, "")
    assert "d_model=" in ran.err
    assert "expected a whole number" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (b"good text\n\xff\xfe bad\n", "300", "UTF-8"),
        (b"", "300", "empty"),
        (b"   \n\n", "300", "empty"),
        (b"to be or not to be\n" * 4, "9000", "largest that fits"),
    ],
    ids=["not UTF-8", "empty", "blank", "a vocabulary larger than the corpus can fill"],
)
def test_a_corpus_that_cannot_serve_is_one_line(
    cli: Any, tmp_path: Path, content: bytes, size: str, message: str
) -> None:
    corpus, made = tmp_path / "corpus.txt", tmp_path / "made"
    corpus.write_bytes(content)
    ran = cli("tokenizer", made, "--from", corpus, f"vocab_size={size}", "convention=t5")
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_prompt_longer_than_the_positions_is_one_line(cli: Any, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXT, 300, convention="gpt2")
    tiny = lathe.preset("gpt2").with_(
        d_model=16, n_heads=2, d_head=8, d_ff=24, n_layers=1, vocab_size=tokenizer.vocab_size, max_positions=16
    )
    lathe.Model(tiny, seed=0, tokenizer=tokenizer).save(tmp_path / "gpt")
    ran = cli("generate", tmp_path / "gpt", "--prompt", "the quick brown fox " * 9)
    assert (ran.code, ran.out) == (2, "")
    assert "the model's 16 positions" in ran.err
    assert ran.err.count("\n") == 1


def test_an_id_outside_the_vocabulary_is_named(good: Path) -> None:
    model = lathe.load(good)
    vocab = model.architecture.embedding.vocab_size
    with pytest.raises(lathe.RequestError, match=f"token id {vocab} at row 0, position 1 is outside the vocabulary"):
        model.generate(torch.tensor([[5, vocab]]))


def test_saving_over_a_model_is_refused_and_leaves_it(good: Path, tmp_path: Path) -> None:
    model = lathe.load(good)
    kept = tmp_path / "kept"
    model.save(kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(lathe.RequestError, match="kept"):
        model.save(kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
