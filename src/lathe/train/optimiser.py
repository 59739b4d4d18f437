"""The optimiser: fused AdamW, with weight decay on matrices alone.

Decay pulls weights towards zero. A matrix that shrinks computes less; a norm's scale that shrinks
computes something else, and the norm behind it would undo it. Which is which is the blueprint's to say:
readers, writers and tables with two axes decay, scales, shifts and biases do not.

`fused` updates all tensors in one pass over memory; the plain loop makes a dozen.
"""

from __future__ import annotations

import torch
from torch import nn

from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train.settings import OptimizerSettings

_DECAYING = ("reader", "writer", "table")


def decays(model: nn.Module) -> dict[str, bool]:
    """Every trained parameter's name, and whether weight decay pulls at it."""
    known = {p.name: p for p in stored(model.architecture)} if isinstance(model, Transformer) else {}
    chosen: dict[str, bool] = {}
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        parameter = known.get(name)  # None for what was put in place of a linear layer
        is_matrix = tensor.ndim >= 2
        chosen[name] = is_matrix and (parameter is None or parameter.role in _DECAYING)
    return chosen


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained.

    Raises:
        RequestError: nothing is trained.
    """
    chosen = decays(model)
    if not chosen:
        raise RequestError("no parameter is trained: every one has requires_grad=False")
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if name in chosen and chosen[name] is decay],
            "weight_decay": settings.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
