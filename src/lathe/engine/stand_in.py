"""What stands in a model's place and is asked the model's questions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lathe.architecture import Architecture
from lathe.model.transformer import Transformer


class StandIn:
    """Computes a model's passes in another way; what it is of, the model says.

    Args:
        model: whose place it takes.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @property
    def architecture(self) -> Architecture:
        """The model's."""
        return self.model.architecture

    @property
    def encoder(self) -> nn.Module | None:
        """The model's, for who asks whether there is one."""
        return self.model.encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the stream and the cache."""
        return self.model.dtype

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's."""
        return self.model.named_parameters()
