"""Adapters on a quantised base: only they learn, the codes stay, and nothing is folded into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lathe
from lathe.adapt import LoraSettings, add_lora, load_adapter, merge, remove_adapters, save_adapter
from lathe.errors import RequestError
from lathe.quantization import QuantizedLinear, codes_of


def quantised(bits: int = 8) -> lathe.Model:
    sizes = {"d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 48, "n_layers": 1, "vocab_size": 40}
    return lathe.quantize(
        lathe.Model(lathe.preset("llama-3.2-1b").with_({**sizes, "n_kv_heads": 2}), seed=0), bits=bits
    )


def loss(model: lathe.Model) -> Tensor:
    ids = torch.arange(3, 27).reshape(2, 12)
    found = model(ids, labels=ids).loss
    assert found is not None
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_get_gradients_and_the_loss_falls(bits: int, dora: bool):
    model = quantised(bits)
    before, codes = loss(model).item(), codes_of(model)
    add_lora(model, LoraSettings(rank=4, dora=dora))
    assert loss(model).item() == pytest.approx(before, rel=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters." in name for name in trained)
    optimiser = torch.optim.Adam(trained.values(), lr=1e-2)
    for _ in range(12):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert loss(model).item() < before - 0.2
    for name, matrix in codes_of(model).items():
        assert torch.equal(matrix.codes_OI, codes[name].codes_OI)


def test_an_adapter_is_saved_loaded_and_taken_off(tmp_path: Path):
    model, fresh = quantised(), quantised()
    add_lora(model, LoraSettings(rank=4, targets="heads"), seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    save_adapter(model, tmp_path / "a")
    without = loss(fresh)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(loss(fresh), loss(model))
    assert not torch.equal(loss(fresh), without)
    remove_adapters(fresh)
    assert torch.equal(loss(fresh), without)
    assert type(fresh.get_submodule("decoder.attention.0.q")) is QuantizedLinear


def test_a_matrix_in_codes_is_not_trained_whole() -> None:
    model = quantised()
    with pytest.raises(RequestError, match=r"feed_forward.0.up is quantised here, .* quantise it with --keep"):
        add_lora(model, LoraSettings(rank=4, targets="heads", whole="decoder.feed_forward.0.up"))
    assert all(".adapters." not in name for name, _ in model.named_parameters())


def test_what_is_done_to_a_quantised_model_is_not_done_to_its_source() -> None:
    sizes = {"d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 48, "n_layers": 1, "vocab_size": 40}
    source = lathe.Model(lathe.preset("gpt2").with_(sizes), seed=0)
    before = {name: tensor.clone() for name, tensor in source.tensors().items()}
    model = lathe.quantize(source, keep=["decoder.attention.0"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.tensors().items())


def test_nothing_is_folded_into_codes(tmp_path: Path):
    model = quantised()
    add_lora(model, LoraSettings(rank=4))
    before = loss(model)
    with pytest.raises(RequestError, match="rounded again"):
        merge(model)
    with pytest.raises(RequestError, match="rounded again"):
        model.save(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    assert torch.equal(loss(model), before)


def test_an_adapters_directory_opens_on_its_quantised_base(tmp_path: Path):
    from lathe.adapt.opening import merge_into_base

    quantised().save(tmp_path / "base")
    model = lathe.load(tmp_path / "base")
    add_lora(model, LoraSettings(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    save_adapter(model, tmp_path / "a", base_model=str(tmp_path / "base"))
    assert torch.equal(loss(lathe.load(tmp_path / "a")), loss(model))
    with pytest.raises(RequestError, match="quantised"):
        merge_into_base(str(tmp_path / "base"), tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
