"""Token ids to vectors, and what is added to them before the first block.

The token table is shared by both stacks. When it is factorised (ALBERT §3.1) its rows are `d_embed` wide;
positions, token types and the input norm work at that width, and one matrix lifts the sum to d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.architecture import Architecture, Stack
from lathe.errors import RequestError
from lathe.model.norm import make_norm
from lathe.model.positions import sinusoid


class Table(nn.Embedding):
    """Vectors by number. None are drawn here: `initialise` draws them, or a checkpoint has them.

    (PyTorch's own draw, of a module that has no memory yet, imports its compiler: two seconds.)
    """

    def reset_parameters(self) -> None:
        """Leave them as they are."""


class TokenTable(Table):
    """The token table, read by row on the way in and, when tied, by column on the way out."""

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the table, and so of the stream."""
        return self.weight.dtype

    def logits(self, hidden_BTE: Tensor, bias_V: Tensor | None = None) -> Tensor:
        """Each hidden state's product with every row, B × T × V."""
        return F.linear(hidden_BTE, self.weight, bias_V)


class Embedding(nn.Module):
    """The token table and the matrix that lifts it to d_model, where there is one."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        spec = architecture.embedding
        self.tokens = TokenTable(spec.vocab_size, architecture.width)
        self.scale = architecture.width**0.5 if spec.scaled else 1.0
        self.projection: nn.Linear | None = None
        if spec.d_embed is not None:
            self.projection = nn.Linear(spec.d_embed, architecture.d_model, bias=spec.projection_bias)


class StackInput(nn.Module):
    """One stack's own part of the embedding: positions, token types and norm."""

    def __init__(self, architecture: Architecture, stack: Stack, *, first: bool) -> None:
        super().__init__()
        width, spec = architecture.width, stack.positions
        self.spec = spec
        self.positions: nn.Embedding | None = None
        if spec.kind == "learned":
            assert spec.max_positions is not None
            self.positions = Table(spec.max_positions + spec.offset, width)
        types = architecture.embedding.token_types if first else 0
        self.token_types = Table(types, width) if types else None
        self.norm = make_norm(stack.norm, width) if stack.input_norm else None
        self.dropout = nn.Dropout(architecture.dropout.embedding)

    def forward(self, x_BTE: Tensor, positions_BT: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token vectors with everything added and normed, B × T × E."""
        self.check_length(positions_BT)
        if self.token_types is not None:
            types = torch.zeros_like(positions_BT) if token_type_ids is None else token_type_ids
            x_BTE = x_BTE + self.token_types(types)
        if self.positions is not None:
            x_BTE = x_BTE + self.positions(positions_BT + self.spec.offset)
        elif self.spec.kind == "sinusoidal":
            x_BTE = x_BTE + sinusoid(positions_BT, x_BTE.shape[-1]).to(x_BTE.dtype)
        if self.norm is not None:
            x_BTE = self.norm(x_BTE)
        out: Tensor = self.dropout(x_BTE)
        return out

    def check_length(self, positions_BT: Tensor) -> None:
        """Raise `RequestError` where a position is past the table."""
        limit = self.spec.limit
        if limit is None or torch.compiler.is_compiling():
            return
        longest = positions_BT.shape[-1]
        if positions_BT.device.type == "cpu" and positions_BT.numel():
            longest = int(positions_BT.max()) + 1
        if longest > limit:
            raise RequestError(
                f"a sequence of {longest} tokens is longer than this model's {limit} positions; "
                "shorten it or truncate when tokenising"
            )
