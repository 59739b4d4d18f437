"""The weights that a model has before training, drawn as its architecture's `initialisation` says.

`normal` is BERT's and GPT-2's N(0, std²); with `scaled_residual` the writers are narrower by √(2·n_layers),
so that the stream does not grow with depth (GPT-2 §2.3). `fan_in` is Mesh TensorFlow's, used by T5: N(0, 1/fan-in),
and queries narrower by √d_head because the scores are not divided by it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, stored


def initialise(model: nn.Module, architecture: Architecture, seed: int) -> None:
    """Draw every parameter of `model` anew; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for parameter in stored(architecture):
            tensor = tensors[parameter.name]
            if parameter.role == "scale":
                tensor.fill_(1.0)
            elif parameter.role in ("shift", "constant") or parameter.is_bias:
                tensor.zero_()
            else:
                drawn = torch.empty(parameter.shape).normal_(
                    0.0, deviation(parameter, architecture), generator=generator
                )
                tensor.copy_(drawn)


def deviation(parameter: Parameter, architecture: Architecture) -> float:
    """The standard deviation of a matrix before training."""
    how = architecture.initialisation
    stack = dict(architecture.stacks).get(parameter.name.split(".")[0])
    if how.kind == "normal":
        if how.scaled_residual and parameter.role == "writer" and stack is not None:
            return how.std / math.sqrt(2 * stack.n_layers)
        return how.std
    if parameter.role == "table":
        return 1.0 if parameter.axes[0].name == "vocab" else 1.0 / math.sqrt(architecture.d_model)
    if parameter.axes[0].name == "vocab":
        return 1.0 if architecture.embedding.d_embed is None else 1.0 / math.sqrt(architecture.width)
    fan_in = parameter.axes[-1].size
    if parameter.axes[0].name == "heads" and stack is not None and not stack.attention.scaled:
        fan_in *= stack.attention.d_head
    return 1.0 / math.sqrt(fan_in)
