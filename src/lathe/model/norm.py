"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019).

LayerNorm centres a token's channels and divides by their standard deviation; RMSNorm divides by the root
mean square and leaves the mean alone, which is why any rotation of the stream passes through it.
Statistics are taken in float32 whatever the stream's type.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lathe.architecture import Norm


class RMSNorm(nn.Module):
    """`x / √(mean(x²) + eps) · weight` over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normed x, same shape and type."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def make_norm(spec: Norm, width: int) -> nn.Module:
    """The norm that `spec` describes, over `width` channels."""
    if spec.kind == "rms":
        return RMSNorm(width, spec.eps)
    return nn.LayerNorm(width, eps=spec.eps, bias=spec.bias)
