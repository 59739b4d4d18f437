"""The optimisers: fused AdamW and Adafactor, with weight decay on matrices alone.

Decay pulls weights towards zero. A matrix that shrinks computes less; a norm's scale that shrinks
computes something else, and the norm behind it would undo it. Which is which is the blueprint's to say:
readers, writers and tables with two axes decay, scales, shifts and biases do not.

`fused` updates all tensors in one pass over memory; the plain loop makes a dozen.

Adafactor (Shazeer & Stern 2018) keeps of a matrix's second moments their means over rows and over columns, and
no first moment: its state is a thousandth of AdamW's, the price a slower start. Its step is relative to the
size of each tensor (their §8), and the rate falls as 1/√step at the latest, whatever the schedule says.

`named_state` and `load_named_state` write an optimiser's moments under the parameters' names, which is how a
checkpoint holds them: a name survives what a number in a list does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lathe.blueprint import stored
from lathe.errors import LatheError, RequestError
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


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the parameters that are trained.

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
    used = [group for group in groups if group["params"]]
    if settings.kind == "adafactor":
        return torch.optim.Adafactor(used, lr=settings.lr)
    return torch.optim.AdamW(used, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as `parameter:what` (`…weight:exp_avg`), as they are; empty before the first step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{what}": tensor
        for parameter, state in optimizer.state.items()
        for what, tensor in state.items()
    }


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give a fresh optimiser the tensors that `named_state` gave; they are copied.

    Raises:
        LatheError: a tensor of a parameter that is not trained here.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition(":")
        if name not in number:
            raise LatheError(f"the optimiser's state holds {key!r}, and {name!r} is not trained here")
        state.setdefault(number[name], {})[what] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
