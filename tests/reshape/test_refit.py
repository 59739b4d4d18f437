"""The fit of a narrow model to its parent: exact where nothing is missing, never worse than none, and stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lathe
from lathe.architecture import Architecture
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.divergence import Divergence
from lathe.reshape.refit import refit
from lathe.reshape.regress import Gain, Linear, Pairs, best, fit_gain, gain_error
from lathe.reshape.state import State
from lathe.reshape.walk import Held, asked_rows, entered, split, stack_of
from tests.reshape.test_width import build, gpt_like, rebuilt, text
from tests.strategies import architectures

few = settings(max_examples=6, deadline=None)


def rows(number: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_of(read: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None = None) -> Pairs:
    pairs = Pairs()
    for part in range(2):
        half = slice(part, None, 2)
        pairs.add(read[half], wanted[half], None if weight is None else weight[half])
    return pairs


def test_a_layer_is_found_from_moments_alone() -> None:
    read, truth, bias = rows(400, 6), rows(3, 6, seed=1), rows(1, 3, seed=2)[0]
    pairs, held = (pairs_of(x, x @ truth.T + bias) for x in (read, rows(50, 6, seed=3)))
    chosen, before, after = best(Linear(torch.zeros(3, 6, dtype=torch.float64), bias * 0), pairs, held)
    assert after < 1e-8 < before
    assert chosen.bias is not None
    torch.testing.assert_close(chosen.weight, truth, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(chosen.bias, bias, rtol=1e-3, atol=1e-3)


def test_moments_tell_what_a_layer_misses() -> None:
    read, wanted, weight = rows(60, 5), rows(60, 4, seed=1), rows(60, 1, seed=2)[:, 0].abs()
    linear = Linear(rows(4, 5, seed=3), rows(1, 4, seed=4)[0])
    assert linear.bias is not None
    error = ((wanted - read @ linear.weight.T - linear.bias).square().sum(1) * weight).sum()
    mean = (wanted * weight[:, None]).sum(0) / weight.sum()
    total = ((wanted - mean).square().sum(1) * weight).sum()

    assert linear.missed(pairs_of(read, wanted, weight)) == pytest.approx(float(error / total), rel=1e-9)


def test_a_layer_that_is_right_already_stays_as_it_is() -> None:
    read, linear = rows(40, 6), Linear(rows(3, 6, seed=1), None)
    pairs = pairs_of(read, read @ linear.weight.T)
    for fit in linear.fits(pairs):
        torch.testing.assert_close(fit.weight, linear.weight, rtol=1e-10, atol=1e-10)


def test_fewer_tokens_than_channels_are_held_to_the_start() -> None:
    read, wanted = rows(4, 20), rows(4, 3, seed=1)
    start = Linear(rows(3, 20, seed=2), None)
    chosen, before, after = best(start, pairs_of(read, wanted), pairs_of(rows(50, 20, seed=3), rows(50, 3, seed=4)))
    assert after <= before
    assert torch.isfinite(chosen.weight).all()


def test_a_norms_weight_and_bias_are_found_through_what_reads_them() -> None:
    z, reader = rows(300, 5), rows(9, 5, seed=1)
    truth, bias = rows(1, 5, seed=2)[0], rows(1, 5, seed=3)[0]
    pairs = pairs_of(z, truth * z + bias)
    gram = reader.T @ reader
    start = Gain(torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    found = fit_gain(start, pairs, gram, gram, ridge=1e-12)
    assert found.bias is not None
    torch.testing.assert_close(found.weight, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.bias, bias, rtol=1e-5, atol=1e-5)
    assert gain_error(found, pairs, gram, gram) < gain_error(start, pairs, gram, gram)


@given(architectures(max_layers=2))
@few
def test_a_walk_ends_where_the_model_does(drawn: Architecture) -> None:
    model, batch = build(drawn), text(drawn, rows=2)
    for name, stack in drawn.stacks:
        held: Held = entered(model, name, batch)
        x = held.x_BTD
        for number in range(stack.n_layers):
            x, _, _ = stack_of(model, name).layer(number)(x, held.around)
        last = stack_of(model, name).leave(x)
    torch.testing.assert_close(last, model(**batch).last_hidden_state)


@given(architectures(max_layers=3), st.booleans())
@few
def test_a_model_that_is_as_it_was_is_left_as_it_was(drawn: Architecture, tied: bool) -> None:
    model, batch = build(drawn), text(drawn, rows=9)
    state = State(drawn, model.state_dict())
    fitted, _ = refit(state, state, torch.eye(drawn.d_model, dtype=torch.float64), [batch])
    for name, old in state.tensors.items():
        torch.testing.assert_close(fitted.wide(name), old.double(), rtol=1e-6, atol=1e-7)


@given(architectures(max_layers=2), st.sampled_from(["rotate", "select", "truncate"]))
@few
def test_a_refit_is_never_worse_on_the_rows_held_out(drawn: Architecture, method: str) -> None:
    if len({stack.norm.kind for _, stack in drawn.stacks}) > 1:
        method = "select"
    model, batch = build(drawn), text(drawn, rows=16)
    width = max(drawn.d_model // 2, 2)
    cuts = [resize(model, {"d_model": width}, calibrate=[batch], method=method, refit=fit) for fit in (False, True)]
    assert cuts[0].architecture.d_model == cuts[1].architecture.d_model == width
    detail = cuts[1].steps[-1].detail
    assert detail["after"] <= detail["before"]
    plain, fitted = (rebuilt(State(cut.architecture, cut.tensors)) for cut in cuts)
    assert fitted(**text(drawn, seed=1)).last_hidden_state.isfinite().all()
    if drawn.head.language is not None or drawn.head.classifier is not None:
        held = Divergence(model, split([batch], 10**6)[1], torch.eye(1))
        assert held(fitted) <= held(plain) * (1 + 1e-6) + 1e-9


def error(model: Transformer, **how: Any) -> float:
    cut = resize(model, {"d_model": 18}, calibrate=[text(model.architecture, rows=64)], **how)
    test = text(model.architecture, seed=1, rows=32)
    with torch.no_grad():
        old = model(**test).logits.log_softmax(-1)
        new = rebuilt(State(cut.architecture, cut.tensors))(**test).logits.log_softmax(-1)
    return float((old.exp() * (old - new)).sum(-1).mean())


SIZES: dict[str, Any] = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_head": 12, "d_ff": 40, "vocab_size": 50}


@pytest.mark.parametrize("method", ["truncate", "select"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt2", {"max_positions": 32}),
        ("t5-small", {}),
        ("bart-base", {"max_positions": 32}),
        ("albert-base", {"max_positions": 32, "d_embed": 12}),
    ],
)
def test_a_refit_makes_up_for_a_part_of_the_cut(name: str, more: dict[str, Any], method: str) -> None:
    head = "masked" if name == "albert-base" else None
    model = build(lathe.preset(name, head=head).with_(SIZES | more))
    assert error(model, method=method, refit=True) < 0.9 * error(model, method=method, refit=False)


def test_one_row_of_text_fits_nothing_and_says_so() -> None:
    architecture = gpt_like()
    batch = {"input_ids": text(architecture, rows=4, length=24)["input_ids"][:1].repeat(1, 1)}
    cut = resize(build(architecture), {"d_model": 16}, calibrate=[batch])
    assert "one row of text cannot be split" in cut.steps[-1].note


def test_labels_say_which_rows_the_head_is_asked_about() -> None:
    model = build(lathe.preset("bert-base-uncased", head="masked").with_(SIZES | {"max_positions": 32}))
    labels = torch.full((2, 4), -100)
    labels[1, 2] = 7
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": labels}
    assert asked_rows(model, torch.Size((2, 4)), batch).nonzero().tolist() == [[6]]
