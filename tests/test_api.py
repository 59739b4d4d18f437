"""What a user holds: load, save, resize, generate, to and from transformers; in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.architecture import Architecture

SMALL = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_head": 12, "d_ff": 32, "vocab_size": 60}
CUTS: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 18},
    "flan-t5-small": {"d_model": 18},
    "gpt2": {"d_model": 18},
    "llama-2-7b": {"d_model": 18},
    "qwen2-0.5b": {"d_model": 18},
    "mbart-large": {"d_model": 18, "method": "select"},
    "bart-base": {"d_model": 18},
    "bert-base-uncased": {"d_model": 18},
    "albert-base": {"d_embed": 8},
}


def small(name: str) -> Architecture:
    head = "masked" if name.startswith(("bert", "albert")) else None
    sizes: dict[str, Any] = {**SMALL, "d_embed": 12} if name.startswith("albert") else SMALL
    if name.startswith("qwen2"):
        sizes = {**sizes, "n_kv_heads": 1}
    return lathe.preset(name, head=head).with_(sizes)


def batch(architecture: Architecture) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 60, (6, 10), generator=torch.Generator().manual_seed(0))
    both = architecture.encoder is not None and architecture.decoder is not None
    return {"input_ids": ids, "decoder_input_ids": ids[:, :7]} if both else {"input_ids": ids}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_opens_in_stock_transformers_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = lathe.Model(small(name), seed=1)
    text = batch(model.architecture)
    cut = lathe.resize(model, calibrate=[text], **CUTS[name])
    saved = cut.save(tmp_path / "cut")
    assert saved.stock, saved.reasons
    kind = getattr(transformers, cut.to_transformers().config.architectures[0])
    stock, told = kind.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        ours, theirs = cut(**text).logits, stock.eval()(**text).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    again = lathe.load(tmp_path / "cut")
    torch.testing.assert_close(again(**text).logits, cut(**text).logits, atol=0, rtol=0)
    # A stock config has no place for the mask token's id; the tokenizer carries it.
    assert again.architecture == cut.architecture.with_({"tokens.mask": None})


def test_resizing_leaves_the_model_as_it_was() -> None:
    model = lathe.Model(small("t5-small"), seed=1)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    lathe.resize(model, d_model=12, calibrate=[batch(model.architecture)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors().items())


def test_plain_ids_calibrate_any_model() -> None:
    ids = torch.randint(4, 60, (6, 10))
    for name in ("t5-small", "gpt2"):
        cut = lathe.resize(lathe.Model(small(name), seed=1), d_model=12, calibrate=[ids])
        assert cut.architecture.d_model == 12
        assert [step.exact for step in cut.steps] == [False] * len(cut.steps)


def test_an_architecture_that_no_family_holds_is_saved_and_loaded_in_lathes_own_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = small("t5-small").with_(d_embed=8, sharing="feed_forward")
    model = lathe.Model(odd, seed=1)
    saved = model.save(tmp_path / "odd")
    assert not saved.stock
    assert "own form" in caplog.text
    assert not (tmp_path / "odd" / "config.json").exists()
    again = lathe.load(tmp_path / "odd")
    assert again.architecture == odd
    text = batch(odd)
    torch.testing.assert_close(again(**text).logits, model(**text).logits, atol=0, rtol=0)
    with pytest.raises(lathe.RequestError, match="cannot hold"):
        model.to_transformers()


def test_loading_something_else_says_what_is_expected() -> None:
    with pytest.raises(lathe.RequestError, match="expected a directory, a hub id or a transformers model"):
        lathe.load(torch.nn.Linear(2, 2))


def test_loading_at_another_precision_converts() -> None:
    model = lathe.Model(small("gpt2"), seed=1)
    assert lathe.load(model.to_transformers(), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_model_keeps_the_mode_of_the_object_it_came_from() -> None:
    stock = lathe.Model(small("gpt2"), seed=1).to_transformers()
    assert not lathe.load(stock.eval()).training
    assert lathe.load(stock.train()).training


def test_a_model_can_be_planned() -> None:
    plan = lathe.Model(small("t5-small"), seed=0).plan(d_model=16).to_dict()
    assert plan["before"]["parameters"]["total"] > plan["after"]["parameters"]["total"]
