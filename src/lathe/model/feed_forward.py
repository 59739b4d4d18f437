"""The position-wise feed-forward (Vaswani et al. 2017, §3.3), plain or gated (Shazeer 2020).

Each token alone goes up to `d_ff` channels, through an activation, and back down. The gated form
multiplies the activated half with a linear half and costs a third matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.architecture import FeedForward


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class FeedForwardLayer(nn.Module):
    """up, (gate,) down and the norm that stands before or after them."""

    def __init__(self, d_model: int, spec: FeedForward, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.gate = nn.Linear(d_model, spec.d_ff, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(d_model, spec.d_ff, bias=spec.bias)
        self.down = nn.Linear(spec.d_ff, d_model, bias=spec.bias)
        self.activation = ACTIVATION_FUNCTIONS[spec.activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What the feed-forward adds to the stream, B × T × D."""
        if self.gate is None:
            inner_BTF = self.activation(self.up(x_BTD))
        else:
            inner_BTF = self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        out: Tensor = self.down(self.dropout(inner_BTF))
        return out
