"""Widths of models that norm their stream: approximate, and far better than choosing channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.state import State
from tests.reshape.test_width import build, gpt_like, rebuilt, text

SIZES: dict[str, Any] = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_head": 12, "d_ff": 40, "vocab_size": 50}


def model_of(name: str, head: str | None = None, **more: Any) -> Transformer:
    return build(lathe.preset(name, head=head).with_(SIZES | {"max_positions": 32} | more))


def error(model: Transformer, width: int, method: str) -> float:
    cut = resize(model, {"d_model": width}, calibrate=[text(model.architecture, rows=64)], method=method)
    narrow, test = rebuilt(State(cut.architecture, cut.tensors)), text(model.architecture, seed=1)
    with torch.no_grad():
        old, new = (each(**test).logits.log_softmax(-1) for each in (model, narrow))
    assert cut.architecture.d_model == width
    assert not any(step.exact for step in cut.steps)
    return float((new - old).square().mean())


@pytest.mark.parametrize(
    ("name", "head", "more"),
    [
        ("bert-base-uncased", "masked", {}),
        ("bert-base-uncased", "masked", {"tied": False}),
        ("bert-base-uncased", "masked", {"sharing": "all"}),
        ("bart-base", None, {}),
        ("bert-base-uncased", "masked", {"encoder.positions.kind": "sinusoidal"}),
    ],
    ids=["tied", "untied", "shared layers", "both stacks", "sinusoidal"],
)
def test_a_fitted_rotation_loses_less_than_chosen_channels(name: str, head: str | None, more: dict[str, Any]) -> None:
    model = model_of(name, head, **more)
    assert error(model, 18, "rotate") < 0.7 * error(model, 18, "select")


def test_at_the_old_width_little_is_lost() -> None:
    model = model_of("bart-base")
    cut = resize(model, {"d_model": 24}, calibrate=[text(model.architecture)])
    assert cut.steps == ()  # nothing was asked for
    assert error(model, 22, "rotate") < error(model, 12, "rotate")


def test_a_classifier_reads_the_narrow_stream() -> None:
    model = model_of("bert-base-uncased", "classification")
    cut = resize(model, {"d_model": 18}, calibrate=[text(model.architecture, rows=32)])
    out = rebuilt(State(cut.architecture, cut.tensors))(**text(model.architecture, seed=1))
    assert out.logits.isfinite().all()
    assert out.last_hidden_state.shape[-1] == 18


def test_stacks_that_norm_in_different_places_are_refused() -> None:
    mixed = lathe.preset("bart-base").with_(SIZES | {"decoder.norm_position": "pre"})
    with pytest.raises(RequestError, match="one stack norms before"):
        resize(build(mixed), {"d_model": 18}, calibrate=[text(mixed)])


def test_a_pre_norm_stack_with_a_normed_input_is_refused() -> None:
    architecture = gpt_like(**{"decoder.input_norm": True})
    with pytest.raises(RequestError, match="norms its embeddings"):
        resize(build(architecture), {"d_model": 24}, calibrate=[text(architecture)])
