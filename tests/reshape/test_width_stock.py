"""Narrow models of every family open in stock transformers, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lathe
from tests.reshape.test_width import text

SIZES: dict[str, Any] = {"d_model": 24, "n_layers": 1, "n_heads": 2, "d_head": 12, "d_ff": 40, "vocab_size": 50}
FAMILIES = {
    "gpt2": ("gpt2", None, {"max_positions": 32}, "AutoModelForCausalLM"),
    "gpt2 untied": ("gpt2", None, {"max_positions": 32, "tied": False}, "AutoModelForCausalLM"),
    "gpt2 classifier": ("gpt2", "classification", {"max_positions": 32}, "AutoModelForSequenceClassification"),
    "llama": ("llama-2-7b", None, {"max_positions": 32}, "AutoModelForCausalLM"),
    "t5": ("t5-small", None, {}, "AutoModelForSeq2SeqLM"),
    "bart": ("bart-base", None, {"max_positions": 32}, "AutoModelForSeq2SeqLM"),
    "mbart": ("mbart-large-cc25", None, {"max_positions": 32}, "AutoModelForSeq2SeqLM"),
    "bert": ("bert-base-uncased", "masked", {"max_positions": 32}, "AutoModelForMaskedLM"),
    "electra": ("electra-small", "masked", {"max_positions": 32, "d_embed": 12}, "AutoModelForMaskedLM"),
    "albert": ("albert-base", "masked", {"max_positions": 32, "d_embed": 12}, "AutoModelForMaskedLM"),
}


@pytest.mark.parametrize("method", ["rotate", "select"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fitted_cut_opens_in_transformers(name: str, method: str, tmp_path: Path) -> None:
    preset, head, more, kind = FAMILIES[name]
    model = lathe.Model(lathe.preset(preset, head=head).with_(SIZES | more), seed=0)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():  # else norms' biases were nothing
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    batch = text(model.architecture, rows=12)
    small = lathe.resize(model, d_model=16, calibrate=[batch], method=method, refit=True)
    assert small.save(tmp_path / "small").stock
    stock, found = getattr(transformers, kind).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    test = text(model.architecture, rows=1, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(**test).logits, small(**test).logits, rtol=1e-4, atol=1e-4)
