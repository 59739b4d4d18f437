"""Adapters over random architectures: nothing changes at first, merging is exact, training touches nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lathe
from lathe.adapt import (
    LoraSettings,
    active_adapter,
    adapter_names,
    add_lora,
    combine,
    is_merged,
    load_adapter,
    merge,
    remove_adapters,
    save_adapter,
    set_active,
    unmerge,
)
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from tests.reshape.test_width import build, text
from tests.strategies import architectures

few = settings(max_examples=15, deadline=None)


def changed(model: Transformer, seed: int) -> None:
    """Give every trainable parameter (the adapter's) other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@given(architectures(max_layers=2, language=True), st.sampled_from([{}, {"rslora": True}, {"dora": True}]))
@few
def test_a_new_adapter_changes_nothing_and_merging_is_exact(drawn, kind):
    model, batch = build(drawn), text(drawn)
    before = model(**batch).logits
    add_lora(model, LoraSettings(rank=2, targets="reader,writer", **kind))
    torch.testing.assert_close(model(**batch).logits, before)
    changed(model, 1)
    adapted = model(**batch).logits
    assert not torch.equal(adapted, before)
    merge(model)
    torch.testing.assert_close(model(**batch).logits, adapted, rtol=1e-6, atol=1e-8)
    unmerge(model)
    torch.testing.assert_close(model(**batch).logits, adapted, rtol=1e-6, atol=1e-8)
    set_active(model, None)
    torch.testing.assert_close(model(**batch).logits, before)


@given(architectures(max_layers=2, language=True))
@few
def test_a_sum_of_adapters_adds_their_updates(drawn):
    model, batch = build(drawn), text(drawn)
    for number, name in enumerate("ab"):
        add_lora(model, LoraSettings(rank=1, targets="reader:ffn"), name=name)
        changed(model, number)
    combine(model, {"a": 1.0, "b": 0.0}, name="only-a")
    alone = model(**batch).logits
    set_active(model, "a")
    torch.testing.assert_close(model(**batch).logits, alone, rtol=1e-6, atol=1e-8)


def test_what_is_of_another_kind_is_refused_by_name() -> None:
    model = lathe.Model(lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1), seed=0)
    settings: Any = {"rank": 2}
    with pytest.raises(RequestError, match=r"settings is a dict: expected LoraSettings; LoraSettings.from_dict"):
        add_lora(model, settings)
    add_lora(model, LoraSettings(rank=2), name="a")
    weights: Any
    for weights, says in ((["a"], "weights is a list"), ({"a": "1"}, "'a' is '1'"), ({"a": True}, "'a' is True")):
        with pytest.raises(RequestError, match=says):
            combine(model, weights, name="b")


def test_training_touches_the_adapter_alone() -> None:
    shape = lathe.preset("t5-small").with_(d_model=16, d_ff=24, n_layers=1, n_heads=2, d_head=4, vocab_size=50)
    model = lathe.Model(shape, seed=0).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_lora(model, LoraSettings(rank=2, targets="*.attention.*.q"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.tensor([[5, 6, 1]]), labels=torch.tensor([[7, 1]])).loss.backward()
        optimizer.step()
    set_active(model, None)
    after = model.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reshaping_takes_the_active_adapter_along() -> None:
    model = build(lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=32, n_layers=1, vocab_size=50))
    batch = text(model.architecture)
    add_lora(model, LoraSettings(rank=2, targets="ffn"))
    changed(model, 1)
    wider = resize(model, {"d_ff": 40})
    grown = Transformer(wider.architecture, device="meta")
    grown.load_state_dict(dict(wider.tensors), assign=True)
    torch.testing.assert_close(grown.eval()(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-8)


TINY = {"d_model": 24, "n_heads": 2, "d_head": 12, "d_ff": 32, "n_layers": 1, "vocab_size": 50}
IDS = torch.tensor([[5, 6, 7, 8]])


def tiny() -> lathe.Model:
    """A small GPT-2 with two adapters, the second one active."""
    model = lathe.Model(lathe.preset("gpt2").with_(TINY), seed=0)
    for number, name in enumerate("ab"):
        add_lora(model, LoraSettings(rank=2, targets="ffn" if name == "a" else "heads"), name=name)
        changed(model, number)
    return model


def test_adapters_are_taken_off_one_by_one_or_all_at_once():
    model = tiny()
    plain = lathe.Model(model.architecture, seed=0)
    with torch.no_grad():
        both, base = model(IDS).logits, plain(IDS).logits
        remove_adapters(model, "a")
        assert adapter_names(model) == ("b",)
        assert torch.equal(model(IDS).logits, both)  # the one that runs is still there
        assert type(model.get_submodule("decoder.feed_forward.0.up")) is torch.nn.Linear
        remove_adapters(model, "b")
        assert active_adapter(model) is None
        assert torch.equal(model(IDS).logits, base)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RequestError, match="the model has no adapter"):
        remove_adapters(model, "b")


def test_taking_a_merged_adapter_off_keeps_what_it_computes():
    model = tiny()
    with torch.no_grad():
        merge(model)
        folded = model(IDS).logits
        remove_adapters(model)
        assert torch.equal(model(IDS).logits, folded)
    assert not is_merged(model)
    with pytest.raises(RequestError, match="nothing to unmerge"):
        unmerge(model)


def test_a_merged_model_is_left_alone_until_it_is_unmerged(tmp_path: Path):
    model = tiny()
    save_adapter(model, tmp_path / "before", name="b")
    merge(model)
    with torch.no_grad():
        folded = model(IDS).logits
    attempts = [
        lambda: merge(model),
        lambda: set_active(model, "a"),
        lambda: add_lora(model, name="c"),
        lambda: combine(model, {"a": 1.0}, name="c"),
        lambda: remove_adapters(model, "a"),
        lambda: load_adapter(model, tmp_path / "before", name="c"),
    ]
    for attempt in attempts:
        with pytest.raises(RequestError, match="an adapter is merged into the model; call unmerge first"):
            attempt()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # What is merged can still be written, and is what was written before.
    save_adapter(model, tmp_path / "after", name="b")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model.save(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(lathe.load(tmp_path / "merged")(IDS).logits, folded)
    unmerge(model)
    set_active(model, None)
    with pytest.raises(RequestError, match="no adapter is active"):
        merge(model)


def test_a_model_is_saved_and_resized_as_it_computes_with_its_adapter(tmp_path: Path):
    model = tiny()
    with torch.no_grad():
        adapted = model(IDS).logits
        model.save(tmp_path / "saved")
        torch.testing.assert_close(lathe.load(tmp_path / "saved")(IDS).logits, adapted)
        wider = lathe.resize(model, d_ff=40)
        torch.testing.assert_close(wider(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
        assert adapter_names(wider) == ()
        assert set(adapter_names(model)) == {"a", "b"}
        assert torch.equal(model(IDS).logits, adapted)
        set_active(model, None)
        model.save(tmp_path / "base")
        base = lathe.Model(model.architecture, seed=0)
        assert torch.equal(lathe.load(tmp_path / "base")(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 64}, "64"),
        ({"targets": "*.nothing.*"}, "nothing"),
        ({"targets": "ffn,,heads"}, "expected terms with commas between"),
        ({"alpha": 0.0}, "alpha=0.0: expected more than 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(values: dict[str, object], message: str) -> None:
    shape = lathe.preset("t5-small").with_(d_model=16, d_ff=24, n_layers=1, n_heads=2, d_head=4, vocab_size=50)
    model = lathe.Model(shape, seed=0)
    with pytest.raises(RequestError) as raised:
        add_lora(model, LoraSettings.from_dict({"targets": "ffn", **values}))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
