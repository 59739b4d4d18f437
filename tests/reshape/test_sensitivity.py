"""Fisher information: what a small change of a norm's output does to the predictions, said before it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lathe
from lathe.architecture import Architecture, Classifier, Head, Pooler
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import moments
from lathe.reshape.sensitivity import Sensitivity, rows_kept, sensitivity
from lathe.reshape.width import norms_of
from tests.reshape.test_width import build, text

SIZES: dict[str, Any] = {"d_model": 8, "d_ff": 12, "n_heads": 2, "n_layers": 2, "vocab_size": 11}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5-small", {"d_head": 4}),
    "llama": ("llama-3.2-1b", {"n_kv_heads": 1, "d_head": 4}),
    "gpt2": ("gpt2", {"d_head": 4, "max_positions": 16}),
    "shared": ("llama-3.2-1b", {"n_kv_heads": 1, "d_head": 4, "sharing": "all"}),
}


def shape(name: str) -> Architecture:
    preset, more = SHAPES[name]
    return lathe.preset(preset).with_({**SIZES, **more})


def gathered(model: Transformer, batches: list[dict[str, Tensor]], *, least_rows: int = 10**6) -> Sensitivity:
    norms = norms_of(model.architecture, "residual")
    tokens = moments(model, batches, norms).tokens
    generator = torch.Generator().manual_seed(0)
    return sensitivity(model, batches, tokens, least_rows=least_rows, generator=generator)


def divergence(old: Tensor, new: Tensor) -> float:
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    return float((old.exp() * (old - new)).sum())


def moved(model: Transformer, norm: str, change: Callable[[Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The logits where a norm's output is changed."""

    def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return change(out)

    handle = model.get_submodule(norm).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits: Tensor = model(**batch).logits
    finally:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
def test_it_foretells_what_an_error_at_a_norm_costs(name: str) -> None:
    model = build(shape(name))
    batch = text(model.architecture, rows=1, length=5)
    seen = gathered(model, [{key: ids.repeat(40, 1) for key, ids in batch.items()}] * 25)
    with torch.no_grad():
        plain = model(**batch).logits
    generator = torch.Generator().manual_seed(1)
    for norm in norms_of(model.architecture, "residual"):
        along = torch.randn(8, generator=generator, dtype=torch.float64)
        along = 1e-3 * along / along.norm()
        cost = 0.0
        for token in range(5):  # errors of different tokens are taken to be independent

            def change(out: Tensor, token: int = token, along: Tensor = along) -> Tensor:
                out = out.clone()
                out[:, token] += along
                return out

            cost += divergence(plain, moved(model, norm, change, batch)) / 5
        told = 0.5 * float(along @ seen.felt[norm] @ along)
        assert told == pytest.approx(cost, rel=0.15), norm  # from 1,000 draws of each label


def test_of_the_last_norm_it_is_what_the_softmax_says() -> None:
    model = build(shape("llama").with_({"tied": False}))
    batch = text(model.architecture, rows=1, length=4)
    seen = gathered(model, [{key: ids.repeat(100, 1) for key, ids in batch.items()}] * 20)
    assert model.head.language is not None
    read_VD = model.head.language.output.get_parameter("weight").detach()
    with torch.no_grad():
        chances_NV = model(**batch).logits[0].softmax(-1)
    exact = sum(read_VD.T @ (p.diag() - torch.outer(p, p)) @ read_VD for p in chances_NV) / len(chances_NV)
    assert isinstance(exact, Tensor)
    assert float((seen.felt["decoder.norm"] - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_the_normed_stream_and_nothing_else_changes(name: str) -> None:
    model = build(shape(name))
    batches = [text(model.architecture, seed=seed) for seed in range(3)]
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    seen, known = gathered(model, batches), moments(model, batches, norms_of(model.architecture, "residual"))
    for norm, count in known.tokens.items():
        rows = seen.rows[norm].double()
        assert len(rows) == count
        torch.testing.assert_close(rows.T @ rows / count, known.mean(norm), rtol=1e-5, atol=1e-5)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rows_are_spread_evenly_over_the_text() -> None:
    model = build(shape("llama"))
    batches = [text(model.architecture, rows=10, length=10, seed=seed) for seed in range(5)]
    few, all_of_them = gathered(model, batches, least_rows=50), gathered(model, batches)
    for norm in few.rows:
        assert torch.equal(few.rows[norm], all_of_them.rows[norm][::10])
        assert torch.equal(few.felt[norm], all_of_them.felt[norm])


@pytest.mark.parametrize("least", [7, 30, 50, 400, 600])
def test_as_many_rows_are_kept_as_were_asked_for(least: int) -> None:
    model = build(shape("llama"))
    seen = gathered(model, [text(model.architecture, rows=10, length=10, seed=n) for n in range(5)], least_rows=least)
    for rows in seen.rows.values():
        assert len(rows) == rows_kept(500, least)
        assert min(least, 500) <= len(rows) < 2 * least


def test_no_rows_are_kept_where_none_are_asked_for() -> None:
    model = build(shape("llama"))
    batch = text(model.architecture)
    none, every = gathered(model, [batch], least_rows=0), gathered(model, [batch])
    assert not none.rows
    assert all(torch.equal(none.felt[norm], felt) for norm, felt in every.felt.items())


def test_a_layer_is_run_again_and_not_kept() -> None:
    model, runs = build(shape("llama")), 0
    assert model.decoder is not None

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    batch = text(model.architecture)
    tokens = moments(model, [batch], norms_of(model.architecture, "residual")).tokens
    handle = model.decoder.feed_forward[0].register_forward_pre_hook(count)
    sensitivity(model, [batch], tokens, least_rows=10, generator=torch.Generator())
    handle.remove()
    assert runs == 2
    assert not model.decoder.checkpointing


def test_padding_counts_for_nothing() -> None:
    model = build(shape("llama"))
    batch = text(model.architecture, rows=4, length=6)
    padded = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3)),
        "attention_mask": nn.functional.pad(torch.ones(4, 6, dtype=torch.long), (0, 3)),
    }
    plain, other = gathered(model, [batch]), gathered(model, [padded])
    for norm in plain.rows:
        torch.testing.assert_close(plain.rows[norm], other.rows[norm])
        torch.testing.assert_close(plain.felt[norm], other.felt[norm])


def test_classes_are_drawn_where_there_is_a_classifier() -> None:
    model = build(shape("gpt2").with_({"head": Head(classifier=Classifier(n_labels=3), pooler=Pooler(token="last"))}))
    batch = text(model.architecture, rows=1, length=4)
    seen = gathered(model, [{key: ids.repeat(100, 1) for key, ids in batch.items()}] * 20)
    assert model.head.classifier is not None
    read_CD = model.head.classifier.weight.detach()
    with torch.no_grad():
        p = model(**batch).logits[0].softmax(-1)
    exact = read_CD.T @ (p.diag() - torch.outer(p, p)) @ read_CD
    assert float((seen.felt["decoder.norm"] - exact).norm() / exact.norm()) < 0.1


def test_without_a_head_every_direction_of_the_last_stream_counts_alike() -> None:
    model = build(shape("llama").with_({"head": Head()}))
    seen = gathered(model, [text(model.architecture, rows=100, length=10, seed=seed) for seed in range(10)])
    torch.testing.assert_close(seen.felt["decoder.norm"], torch.eye(8).double(), rtol=0.1, atol=0.1)
