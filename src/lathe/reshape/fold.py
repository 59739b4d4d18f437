"""Move every norm's scale and bias into what reads the norm: exact, and the first step of a rotation.

A rotation passes through a norm only if the norm treats all channels alike. `W (γ∘x̂ + β) + b` is
`(W·diag(γ)) x̂ + (W β + b)`, so readers take γ into their columns and β into their bias, and the norm is
left with weight 1 and bias 0. A reader without a bias gets one where its norm has a β.

A norm that a tied token table reads keeps its scale: the table also writes the stream, and cannot hold γ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, blueprint
from lathe.reshape.state import State, blocks


def readers(architecture: Architecture, norm: str) -> list[Parameter]:
    """The weights that consume the norm's output, tied uses included."""
    return [p for p in blueprint(architecture) if p.norm == norm and not p.is_bias]


def is_tied(architecture: Architecture, norm: str) -> bool:
    """Whether a tied table reads the norm, so that its scale must stay."""
    return any(p.tied_to for p in readers(architecture, norm))


def fold(state: State, norms: list[str]) -> State:
    """The state with the scale and bias of each of `norms` moved into its readers; tied norms are left alone."""
    foldable = [norm for norm in norms if not is_tied(state.architecture, norm) and readers(state.architecture, norm)]
    state = _with_biases(state, foldable)
    changed = state.blank()
    for norm in foldable:
        scale = state.wide(f"{norm}.weight")
        has_shift = f"{norm}.bias" in state.tensors
        shift = state.wide(f"{norm}.bias") if has_shift else torch.zeros_like(scale)
        for reader in readers(state.architecture, norm):
            source = changed if reader.name in changed else state.tensors
            weight = source[reader.name].detach().cpu()
            changed[reader.name] = weight * scale  # in float64, as the scale is
            if has_shift:
                bias, constant = _bias_for(reader.name), _times(weight, shift) * _input_factor(state, reader.name)
                if bias != reader.name.removesuffix("weight") + "bias":
                    constant = _times(_output_table(state), constant)
                before = changed if bias in changed else state.tensors
                changed[bias] = before[bias].detach().cpu() + constant
        changed[f"{norm}.weight"] = torch.ones_like(scale)
        if has_shift:
            changed[f"{norm}.bias"] = torch.zeros_like(scale)
    return state.with_(changed)


def _input_factor(state: State, weight: str) -> float:
    """What a reader's input is multiplied with on its way from the norm: a scaled head's d_model^-1/2."""
    language = state.architecture.head.language
    scaled = language is not None and language.scaled and weight.startswith("head.language.")
    return state.architecture.d_model**-0.5 if scaled else 1.0


def _with_biases(state: State, norms: list[str]) -> State:
    """Give a zero bias to every reader of a norm that has one, where the reader has none."""
    changes: dict[str, Any] = {}
    for norm in norms:
        if f"{norm}.bias" not in state.tensors:
            continue
        for reader in readers(state.architecture, norm):
            if _bias_for(reader.name) not in state.tensors:
                changes[_bias_field(reader.name)] = True
    if not changes:
        return state
    architecture = state.architecture.with_(changes)
    grown = State(architecture, state.tensors)
    zeros = {
        p.name: torch.zeros(p.shape, dtype=torch.float64) for p in grown.parameters() if p.name not in state.tensors
    }
    return state.with_(zeros, changes)


def _bias_for(weight: str) -> str:
    """The bias that takes what a norm's shift becomes in the linear layer of `weight`.

    A factorised head's projection has none; what it would hold goes on to the output's.
    """
    if weight == "head.language.projection.weight":
        return "head.language.output.bias"
    return weight.removesuffix("weight") + "bias"


def _output_table(state: State) -> Tensor:
    """What a language head multiplies last: its own table, or the token table."""
    own = "head.language.output.weight"
    return state.tensors[own if own in state.tensors else "embedding.tokens.weight"].detach().cpu()


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix, in any type, times a float64 vector, block by block."""
    return torch.cat([matrix[some].to(torch.float64) @ vector for some in blocks(matrix)])


def _bias_field(weight: str) -> str:
    """The field of the architecture that gives the linear layer of `weight` a bias."""
    first, kind = weight.split(".")[:2]
    if first == "embedding":
        return "embedding.projection_bias"
    if first == "head":
        return "head.language.bias" if kind == "language" else "head.classifier.bias"
    return f"{first}.feed_forward.bias" if kind == "feed_forward" else f"{first}.attention.bias"
