"""A static key-value cache that holds a ragged batch.

Generation would otherwise recompute every earlier token's keys and values at every step. The cache keeps
them: B × G × slots × K per layer, allocated once. Each row fills its own slots from 0, without gaps, so
rows of different lengths stand side by side and a pad is never stored: it goes to one spare slot at the
end that no query reads. Only the filled part is read.

Cross-attention's keys and values never change during generation; `fixed` layers compute them once from
the encoder's output and serve them from then on. Rows that continue one prompt (beams, several samples)
read the same ones: `memory` then has a row for each prompt and not for each row.

Where all rows begin with the same tokens, their keys and values can be held once: `begin_with` sets them before
the rows' own, and attention reads them for all rows at once (`lathe.model.attention.attend_shared`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError


class LayerCache:
    """One layer's keys and values; `Cache` owns it and says where new tokens go."""

    def __init__(self, owner: Cache | None = None, k_BGSK: Tensor | None = None, v_BGSK: Tensor | None = None) -> None:
        self.owner = owner
        self.k, self.v = k_BGSK, v_BGSK
        # What every row begins with, 1 × G × S × K each; a query sees it before what `write` returns.
        self.shared: tuple[Tensor, Tensor] | None = None

    @property
    def fixed(self) -> bool:
        """Whether keys and values are final: a memory that has been read once."""
        return self.owner is None and self.k is not None

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values of a fixed layer."""
        assert self.k is not None
        assert self.v is not None
        return self.k, self.v

    def write(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; return all that a query may need to read."""
        if self.owner is None:
            self.k, self.v = k_BGTK, v_BGTK
            return k_BGTK, v_BGTK
        k, v = self.read()
        rows, slots = self.owner.rows_B1, self.owner.slots_BT
        k[rows, :, slots] = k_BGTK.transpose(1, 2).to(k.dtype)
        v[rows, :, slots] = v_BGTK.transpose(1, 2).to(v.dtype)
        filled = self.owner.filled
        return k[:, :, :filled], v[:, :, :filled]


class Cache:
    """The keys and values of a decoder.

    Args:
        architecture: whose decoder it serves.
        batch: rows.
        slots: the longest row, prompt and new tokens together.

    Raises:
        RequestError: where the architecture has no decoder.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch: int,
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        stack = architecture.decoder
        if stack is None:
            raise RequestError(
                "a cache needs a decoder, and this architecture is an encoder alone; call it without one"
            )
        self.capacity = slots
        self.n_shared = 0
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.rows_B1 = torch.arange(batch, device=device)[:, None]
        self.slots_BT = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self._added = torch.zeros_like(self.lengths_B)
        self.filled = 0
        shape = (batch, stack.attention.kv_heads, slots + 1, stack.attention.d_head)
        self.layers = [
            LayerCache(
                self,
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(stack.n_layers)
        ]
        self.memory = [LayerCache() for _ in range(stack.n_layers)] if stack.cross_attention else []

    def place(self, new_BT: Tensor | None, n_new: int) -> Tensor:
        """Give each new token its slot; its position, B × T, which is the slot after what all rows share.

        A pad gets the spare slot.

        Args:
            new_BT: 1 for a token, 0 for a pad; None where all are tokens.
            n_new: T.
        """
        if self.filled + n_new > self.capacity:
            raise RequestError(
                f"{self.filled + n_new} tokens for a cache of {self.capacity}: "
                "expected at most its slots; make it larger or generate less"
            )
        if new_BT is None:
            self.slots_BT = self.lengths_B[:, None] + torch.arange(n_new, device=self.lengths_B.device)
            self._added = torch.full_like(self.lengths_B, n_new)
        else:
            new_BT = new_BT.long()
            slots = self.lengths_B[:, None] + new_BT.cumsum(1) - 1
            self.slots_BT = torch.where(new_BT.bool(), slots, self.capacity)
            self._added = new_BT.sum(1)
        # An upper bound kept on the host, so that a GPU is never waited for.
        self.filled += n_new
        return self.slots_BT + self.n_shared if self.n_shared else self.slots_BT

    @property
    def seen(self) -> int:
        """The most positions that a query may look at: what all rows share and the filled slots."""
        return self.n_shared + self.filled

    def begin_with(self, beginning: Cache) -> None:
        """Let every row begin with what the only row of another cache holds; nothing is copied.

        What is placed from then on stands after it. Raises RequestError where the other has more rows than one.
        """
        if len(beginning.lengths_B) != 1:
            raise RequestError(f"a beginning of {len(beginning.lengths_B)} rows: expected a cache of one row")
        self.n_shared = beginning.filled
        for own, other in zip(self.layers, beginning.layers, strict=True):
            k_1GSK, v_1GSK = other.read()
            own.shared = k_1GSK[:, :, : self.n_shared], v_1GSK[:, :, : self.n_shared]

    def advance(self) -> None:
        """Count the tokens just placed as part of each row."""
        self.lengths_B = self.lengths_B + self._added

    def rewind(self, lengths_B: Tensor, n_new_B: Tensor) -> None:
        """Forget what each row holds past its length, and make ready for `n_new_B` tokens of each in one pass.

        The slots that were in use are written over; only those up to the longest row are read.
        """
        self.lengths_B = lengths_B
        # `place` adds the pass's columns, pads counted; rows at their end hold pads there and need no slots.
        self.filled = int((lengths_B + n_new_B).max()) - int(n_new_B.max())

    def spread(self, copies: int) -> None:
        """Make each row `copies` rows side by side. They share what they read of the encoder."""
        self._take(torch.arange(len(self.lengths_B), device=self.lengths_B.device).repeat_interleave(copies))

    def swap(self, rows_B: Tensor) -> None:
        """Make row i a copy of the old row `rows_B[i]`, in place, where both read the same encoder's row (beams).

        Only rows that change are moved, and of them only the filled slots.
        """
        changed = (rows_B != self.rows_B1[:, 0]).nonzero()[:, 0]
        if not len(changed):
            return
        from_B = rows_B[changed]
        self.lengths_B = self.lengths_B[rows_B]
        for layer in self.layers:
            for tensor in layer.read():
                tensor[changed, :, : self.filled] = tensor[from_B, :, : self.filled]

    def reorder(self, rows_B: Tensor) -> None:
        """Make row i a copy of the old row `rows_B[i]`, with all that it reads; rows may become fewer or more."""
        for layer in self.memory:
            if layer.k is not None and layer.v is not None:
                sources_B = rows_B // (len(self.lengths_B) // len(layer.k))
                layer.k, layer.v = layer.k[sources_B], layer.v[sources_B]
        self._take(rows_B)

    def _take(self, rows_B: Tensor) -> None:
        self.lengths_B = self.lengths_B[rows_B]
        self.rows_B1 = torch.arange(len(rows_B), device=rows_B.device)[:, None]
        for layer in self.layers:
            k, v = layer.read()
            layer.k, layer.v = self._taken(k, rows_B), self._taken(v, rows_B)

    def _taken(self, old_BGSK: Tensor, rows_B: Tensor) -> Tensor:
        new_BGSK = old_BGSK.new_zeros(len(rows_B), *old_BGSK.shape[1:])
        new_BGSK[:, :, : self.filled] = old_BGSK[rows_B, :, : self.filled]
        return new_BGSK

    def part(self, first: int, lengths_B: Tensor, filled: int, every: int = 1) -> Cache:
        """Rows from `first` on as a cache of their own, in the same memory; what it reads of an encoder is not set.

        Args:
            lengths_B: how many tokens of its own each of the rows holds already.
            filled: the slots that are read before any is added: with the columns to come, at most `capacity`.
            every: the distance from one of the rows to the next.
        """
        rows = slice(first, first + every * len(lengths_B), every)
        part = copy.copy(self)
        part.lengths_B, part.filled = lengths_B, filled
        part.rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        part.layers = [LayerCache(part, *(tensor[rows] for tensor in layer.read())) for layer in self.layers]
        for own, layer in zip(part.layers, self.layers):
            own.shared = layer.shared
        part.memory = [LayerCache() for _ in self.memory]
        return part

    @property
    def nbytes(self) -> int:
        """The bytes that the cache holds, and those of what all rows share, with its spare slot."""
        tensors = [t for layer in [*self.layers, *self.memory] for t in (layer.k, layer.v) if t is not None]
        beginning = [t for layer in self.layers for t in layer.shared or ()]
        own = sum(t.numel() * t.element_size() for t in tensors)
        return own + sum(t.untyped_storage().nbytes() for t in beginning)
