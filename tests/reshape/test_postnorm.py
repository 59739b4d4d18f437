"""Widths of models that norm their stream: approximate, and far better than choosing channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lathe
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.state import State
from tests.reshape.test_width import build, gpt_like, rebuilt, text

SIZES: dict[str, Any] = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_head": 12, "d_ff": 40, "vocab_size": 50}


def model_of(name: str, head: str | None = None, **more: Any) -> Transformer:
    return build(lathe.preset(name, head=head).with_(SIZES | {"max_positions": 32} | more))


def error(model: Transformer, width: int, method: str, *, refit: bool = True) -> float:
    cut = resize(model, {"d_model": width}, calibrate=[text(model.architecture, rows=64)], method=method, refit=refit)
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
    assert error(model, 18, "rotate") < 0.7 * error(model, 18, "select", refit=False)


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


@pytest.mark.parametrize(
    "model",
    [
        lambda: model_of("bart-base", **{"decoder.norm_position": "pre"}),
        lambda: build(gpt_like(**{"decoder.input_norm": True})),
        lambda: model_of("mbart-large-cc25"),
    ],
    ids=["one stack norms before, one after", "a norm on the embeddings", "mBART"],
)
def test_norms_of_every_place_are_fitted(model: Any) -> None:
    made = model()
    assert error(made, 18, "rotate") < error(made, 18, "select", refit=False)
