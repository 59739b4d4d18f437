"""The places of a static cache, which rows take and leave.

All memory is taken once: `slots` rows of `tokens` places, and for an encoder-decoder as many of `source` tokens of
cross-attention. The rows in flight always stand in the first places, side by side, so a step reads and writes a
slice and copies nothing. When a row leaves, the last one is moved into its place.

A place remembers which tokens' keys and values it holds, also after its row has left. A decoder's keys and values
depend on nothing but the tokens up to their own, so a new row that starts with the same tokens takes them over
instead of computing them (the idea of PagedAttention's shared blocks, Kwon et al. 2023, §4.4; here they are copied).
A decoder beside an encoder also depends on the source, and shares nothing.

Shape suffixes: B rows, T positions, S encoder positions, G key-value heads, K d_head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import LatheError
from lathe.generate.memory import check_room, decoding_bytes, free_bytes
from lathe.generate.rows import next_logits
from lathe.model.cache import Cache, LayerCache
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer

# More rows than this make a step slower about as fast as they make it do more.
_MOST_SLOTS = 64
# Of the memory that is free, the part that the cache may take; a pass holds its own tensors beside it.
_SHARE = 0.5


@dataclass(frozen=True)
class SlotPlan:
    """What a cache of places holds.

    Args:
        slots: rows at once.
        tokens: of each at most, prompt and new ones together.
        source: tokens of each row's source at most; 0 without an encoder.
        n_bytes: of the cache and of one step's logits.
    """

    slots: int
    tokens: int
    source: int
    n_bytes: int


def plan_slots(
    architecture: Architecture,
    rows: int,
    tokens: int,
    source: int,
    *,
    slots: int | None,
    itemsize: int,
    device: torch.device,
) -> SlotPlan:
    """How many of `rows` rows go at once, and the bytes that they take.

    Args:
        slots: as many, or as there are rows if these are fewer; None: as many as half of the free memory holds,
            at most 64.

    Raises:
        RequestError: more rows than the memory holds, or not even one.
    """
    if slots is None:
        each = decoding_bytes(architecture, 1, tokens, 1, source, itemsize)
        free = free_bytes(device)
        slots = _MOST_SLOTS if free is None else max(1, min(_MOST_SLOTS, int(free * _SHARE) // each))
    slots = min(slots, rows)
    needed = decoding_bytes(architecture, slots, tokens, slots, source, itemsize)
    check_room(needed, slots, tokens, device)
    return SlotPlan(slots, tokens, source, needed)


class Slots:
    """Rows in flight in a cache that never grows.

    Args:
        model: has a causal decoder and a language head.
        plan: the sizes.

    Raises:
        LatheError: no memory for the cache.
    """

    def __init__(self, model: Transformer, plan: SlotPlan) -> None:
        self.model, self.plan = model, plan
        assert model.architecture.decoder is not None
        spec = model.architecture.decoder.attention
        try:
            self.cache = Cache(model.architecture, plan.slots, plan.tokens, dtype=model.dtype, device=model.device)
            shape = (plan.slots, spec.kv_heads, plan.source, spec.d_head)
            self.cache.memory = [
                LayerCache(None, *(torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2)))
                for _ in self.cache.memory
            ]
        except RuntimeError as error:  # what torch raises on every device when memory runs out
            raise LatheError(
                f"a cache for {plan.slots:,} rows of {plan.tokens:,} tokens does not fit into memory; "
                "ask for fewer new tokens, or for fewer slots"
            ) from error
        self.held: list[list[int]] = [[] for _ in range(plan.slots)]  # whose keys and values each place holds
        self.sources = [0] * plan.slots  # how long the source of each place's row is
        self.used = 0

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of the first tokens some place holds, and which; the last token never counts, it has to be read."""
        if self.cache.memory:
            return 0, self.used
        # Where two hold as many, the place that the next row takes comes first: nothing is copied then.
        order = sorted(range(self.plan.slots), key=lambda place: place != self.used)
        found = [(shared(self.held[place], tokens), -rank, place) for rank, place in enumerate(order)]
        length, _, place = max(found)
        return min(length, len(tokens) - 1), place

    def take(self, tokens: Sequence[int], length: int, place: int) -> None:
        """Give the next free place to a row, with the first `length` of its tokens copied from `place`."""
        if place != self.used:
            for layer in self.cache.layers:
                for tensor in layer.read():
                    tensor[self.used, :, :length] = tensor[place, :, :length]
        self.held[self.used] = list(tokens[:length])
        self.used += 1

    def read_prompts(self, prompts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] = ()) -> Tensor:
        """Read what is left of the prompts of the rows that came last; the logits of each one's next token, B × V.

        Args:
            prompts: whole, of the last rows that took a place.
            sources: what the encoder reads for each, where there is one.
        """
        first = self.used - len(prompts)
        rest = [list(prompt[len(self.held[first + row]) :]) for row, prompt in enumerate(prompts)]
        ids_BT, mask_BT = self._padded(rest, left=True)
        # The columns of the rest may stand over the shared part of a longer row: what is read ends with the longest.
        cache = self._part(first, max(map(len, prompts)) - ids_BT.shape[1])
        memory = None
        if sources:
            self.sources[first : self.used] = map(len, sources)
            ids_BS, mask_BS = self._padded(sources, left=False)
            with torch.no_grad():
                memory = self.model.encode(ids_BS, mask_BS)
            cache.memory = [
                _Filling(*(tensor[first : self.used] for tensor in layer.read())) for layer in self.cache.memory
            ]
        logits_BV = next_logits(self.model, ids_BT, mask_BT, cache, memory)
        for row, ids in enumerate(rest):
            self.held[first + row] += ids
        return logits_BV

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of every row in flight; the logits of the one after, B × V."""
        cache = self._part(0, max(map(len, self.held[: self.used])))
        memory = None
        if cache.memory:
            longest = max(self.sources[: self.used])
            cache.memory = [
                LayerCache(None, *(tensor[: self.used, :, :longest] for tensor in layer.read()))
                for layer in self.cache.memory
            ]
            lengths_B = torch.tensor(self.sources[: self.used], device=self.model.device)
            seen_BS = torch.arange(longest, device=self.model.device) < lengths_B[:, None]
            # The keys and values are all there, so nothing of the encoder's output is read but its shape.
            memory = Memory(self._nothing(longest), seen_BS.long())
        ids_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        logits_BV = next_logits(self.model, ids_B1, None, cache, memory)
        for held, token in zip(self.held, tokens):
            held.append(token)
        return logits_BV

    def leave(self, place: int) -> None:
        """Free a place; the last row in flight moves there. What the last place held stays to be shared."""
        self.used -= 1
        if place == self.used:
            return
        length, source = len(self.held[self.used]), self.sources[self.used]
        for layers, filled in ((self.cache.layers, length), (self.cache.memory, source)):
            for layer in layers:
                for tensor in layer.read():
                    tensor[place, :, :filled] = tensor[self.used, :, :filled]
        self.held[place], self.sources[place] = list(self.held[self.used]), source

    def _part(self, first: int, filled: int) -> Cache:
        lengths = [len(held) for held in self.held[first : self.used]]
        return self.cache.part(first, torch.tensor(lengths, device=self.model.device), filled)

    def _nothing(self, longest: int) -> Tensor:
        return torch.empty(self.used, longest, 0, dtype=self.model.dtype, device=self.model.device)

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Ids, short rows filled up, and a mask; any id serves as a pad that is not read."""
        width = max(map(len, rows))
        pads = [[0] * (width - len(row)) for row in rows]
        ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads)]
        ones = [[1] * len(row) for row in rows]
        mask = [[*pad, *one] if left else [*one, *pad] for one, pad in zip(ones, pads)]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)


class _Filling(LayerCache):
    """Cross-attention's keys and values on their way into rows of a larger tensor; one layer's are held at a time."""

    def __init__(self, k_BGSK: Tensor, v_BGSK: Tensor) -> None:
        super().__init__()
        self._into = k_BGSK, v_BGSK

    def write(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store them; return them."""
        for into, new in zip(self._into, (k_BGTK, v_BGTK)):
            into[:, :, : new.shape[2]] = new
        return k_BGTK, v_BGTK


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts start with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
