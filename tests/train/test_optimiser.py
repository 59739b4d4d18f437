"""Which parameters decay, and that nothing is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train import OptimizerSettings
from lathe.train.optimiser import decays, make_optimizer


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_matrices_decay_and_norms_and_biases_do_not(shape: Callable, name: str):
    chosen = decays(Transformer(shape(name)[0], seed=0))
    assert chosen["embedding.tokens.weight"]
    for parameter, decay in chosen.items():
        assert decay == (parameter.endswith(".weight") and "norm" not in parameter), parameter


def test_every_parameter_is_in_one_group(shape: Callable):
    model = Transformer(shape("bert")[0], seed=0)
    groups = make_optimizer(model, OptimizerSettings()).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


def test_frozen_parameters_are_left_out(shape: Callable):
    model = Transformer(shape("gpt2")[0], seed=0).requires_grad_(False)
    with pytest.raises(RequestError, match="no parameter is trained"):
        make_optimizer(model, OptimizerSettings())
    model.get_parameter("decoder.norm.weight").requires_grad_(True)
    assert [len(group["params"]) for group in make_optimizer(model, OptimizerSettings()).param_groups] == [1]


def test_the_fused_step_is_adamw(shape: Callable):
    """Against AdamW written out (Loshchilov & Hutter 2019, algorithm 2), first step."""
    model = Transformer(shape("gpt2")[0], seed=0)
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5, beta1=0.9, beta2=0.99)
    optimizer = make_optimizer(model, settings)
    weight = model.get_parameter("decoder.feed_forward.0.up.weight")
    before, gradient = weight.detach().clone(), torch.randn_like(weight)
    weight.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected)
