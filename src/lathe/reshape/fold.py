"""Move every norm's scale and bias into what reads the norm: exact, and the first step of a rotation.

A rotation passes through a norm only if the norm treats all channels alike. `W (γ∘x̂ + β) + b` is
`(W·diag(γ)) x̂ + (W β + b)`, so readers take γ into their columns and β into their bias, and the norm is
left with weight 1 and bias 0.

A reader without a bias (the head of an untied GPT-2, a classifier) has a place for the constant Wβ all the same. x̂ of
a LayerNorm has no mean, so what W's rows have along the constant vector reads nothing: it is taken away, Wβ/d is
written there in its stead, and a bias of 1 is left on the norm for it to read.

A norm that a tied token table reads keeps its scale: the table also writes the stream, and cannot hold γ.
"""

from __future__ import annotations

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
    changed = state.blank()
    for norm in foldable:
        scale = state.wide(f"{norm}.weight")
        has_shift = f"{norm}.bias" in state.tensors
        shift = state.wide(f"{norm}.bias") if has_shift else torch.zeros_like(scale)
        reading = [reader.name for reader in readers(state.architecture, norm)]
        stays = has_shift and not all(_bias_for(name) in state.tensors for name in reading)
        for name in reading:
            source = changed if name in changed else state.tensors
            weight = source[name].detach().cpu()
            folded = weight * scale  # in float64, as the scale is
            if stays:
                folded -= folded.mean(1, keepdim=True)
            if has_shift and (bias := _bias_for(name)) in state.tensors:
                constant = _times(weight, shift) * _input_factor(state, name)
                if bias != name.removesuffix("weight") + "bias":
                    constant = _times(_output_table(state), constant)
                before = changed if bias in changed else state.tensors
                changed[bias] = before[bias].detach().cpu() + constant
            elif has_shift:
                folded += _times(weight, shift)[:, None] / len(shift)
            changed[name] = folded
        changed[f"{norm}.weight"] = torch.ones_like(scale)
        if has_shift:
            changed[f"{norm}.bias"] = torch.full_like(scale, 1.0 if stays else 0.0)
    return state.with_(changed)


def _input_factor(state: State, weight: str) -> float:
    """What a reader's input is multiplied with on its way from the norm: a scaled head's d_model^-1/2."""
    language = state.architecture.head.language
    scaled = language is not None and language.scaled and weight.startswith("head.language.")
    return state.architecture.d_model**-0.5 if scaled else 1.0


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
