"""The files as stock `transformers` opens them: every tensor in its place, and Lathe's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.quantization import codes_of
from tests.quantization.test_quantise import drawn, inputs, text

WAYS: tuple[dict[str, Any], ...] = (
    {"bits": 8},
    {"bits": 8, "activations": "none"},
    {"bits": 8, "group": 32},
    {"bits": 4},
    {"bits": 4, "group": 64, "tables": 16},
)


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_transformers_computes_the_same(name: str, how: dict[str, Any], tmp_path: Path):
    model = drawn(name)
    quantised = lathe.quantize(model, calibrate=text(model) if how["bits"] == 4 else (), **how)
    _same(quantised, tmp_path / "q")


def test_a_layer_rounds_its_inputs_as_transformers_does(tmp_path: Path):
    quantised = lathe.quantize(drawn("llama"))
    quantised.save(tmp_path / "q")
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "q").eval()
    stock(**inputs(quantised))  # what makes its weights numbers again
    x, ours = torch.randn(2, 5, 64), quantised.get_submodule("decoder.attention.0.q")
    torch.testing.assert_close(ours(x), stock.model.layers[0].self_attn.q_proj(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["albert", "electra", "bart"])
def test_the_other_families_open_too(name: str, bits: int, tmp_path: Path):
    _same(lathe.quantize(drawn(name), bits=bits), tmp_path / "q")


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_a_t5_opens_in_eight_bits_and_generates(name: str, tmp_path: Path):
    quantised = lathe.quantize(drawn(name), activations="none")
    stock = _same(quantised, tmp_path / "q")
    ids = inputs(quantised)["input_ids"]
    theirs = stock.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(quantised.generate(ids, max_new_tokens=5, do_sample=False), theirs)


def _same(quantised: lathe.Model, folder: Path) -> Any:
    """Save, open with the stock class, compare; the stock model, which has run once."""
    assert quantised.save(folder).stock
    kind = getattr(transformers, _class_of(folder))
    stock, info = kind.from_pretrained(folder, output_loading_info=True)
    assert sorted(info["missing_keys"]) == sorted(info["unexpected_keys"]) == []
    with torch.no_grad():
        ours, theirs = quantised(**inputs(quantised)).logits, stock.eval()(**inputs(quantised))
    found = theirs.logits if "logits" in theirs else theirs.prediction_logits
    assert ours is not None
    # An input that stands between two codes may be rounded to either, and what follows moves with it.
    assert float((ours - found).norm() / ours.norm()) < (0.02 if any(_rounds(quantised)) else 1e-5)
    return stock


def _rounds(model: lathe.Model) -> list[bool]:
    return [matrix.activations == "int8" for matrix in codes_of(model).values()]


def _class_of(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])
