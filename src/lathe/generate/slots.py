"""The places of a static cache, which rows take and leave.

All memory is taken once: `slots` places of `width` rows each (one, or the beams of a prompt), for an encoder-decoder
some sources of cross-attention, and what all prompts begin with. The places in flight always stand first, side by
side, so a step reads and writes a slice and copies nothing. When a row leaves, the last one is moved into its place.

Three things are shared.

- *What all prompts begin with* is read and held once, in a cache of one row. Every row's keys and values follow it, and
  attention reads it for all rows at once (Hydragen; Juravsky et al. 2024).
- *A source* that several rows read is encoded once, and its cross-attention keys and values are held once. Where
  sources are shared the rows of one layer at a time are gathered for a step; where all differ they stand in the order
  of the places and nothing is.
- *What only some prompts begin with* is computed once. A place remembers which tokens' keys and values it holds, also
  after its row has left, and a new row that starts with the same tokens copies them. It does not refer to them: places
  come and go, and a slice that a step can read as it stands is worth more than the memory (PagedAttention refers, block
  by block, and needs a kernel that reads blocks; Kwon et al. 2023, §4.4).

A decoder beside an encoder starts from one token, so there is no beginning to share.

Shape suffixes: B rows, T positions, S encoder positions, G key-value heads, K d_head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.engine.choose import Reader
from lathe.errors import LatheError
from lathe.generate.memory import check_room, decoding_bytes, free_bytes
from lathe.generate.rows import next_logits
from lathe.model.cache import Cache, LayerCache
from lathe.model.stack import Memory

# More rows than this make a step slower about as fast as they make it do more.
_MOST_ROWS = 64
# Of the memory that is free, the part that the cache may take; a pass holds its own tensors beside it.
_SHARE = 0.5
# So many tokens alike are worth holding once: attention in two parts costs a step something.
_WORTH_SHARING = 16


@dataclass(frozen=True)
class SlotPlan:
    """What a cache of places holds.

    Args:
        slots: places; prompts, or samples of one, that are decoded at once.
        width: rows of each place: the beams of a prompt.
        tokens: of each row at most, prompt and new ones together, without what all share.
        shared: the first tokens of all prompts, held once; 0 where that is not worth it.
        sources: how many different sources are held; 0 without an encoder.
        source: tokens of each at most.
        mapped: whether places may read one source; else each reads the one at its own number.
        n_bytes: of the cache and of one step's logits.
    """

    slots: int
    width: int
    tokens: int
    shared: int
    sources: int
    source: int
    mapped: bool
    n_bytes: int


def plan_slots(
    architecture: Architecture,
    texts: Sequence[tuple[Sequence[int], int]],
    sources: Sequence[Sequence[int]] = (),
    *,
    copies: int = 1,
    slots: int | None,
    width: int = 1,
    itemsize: int,
    device: torch.device,
) -> SlotPlan:
    """How many of the rows that wait go at once, and the bytes that they take.

    Args:
        texts: what each prompt's rows start with and how many tokens are added to it at most.
        sources: what the encoder reads for each prompt, where there is one.
        copies: rows of each prompt that are decoded by themselves (samples).
        slots: as many, or as there are rows if these are fewer; None: as many as half of the free memory holds,
            at most 64 rows.
        width: rows that each takes.

    Raises:
        RequestError: more rows than the memory holds, or not even one.
    """
    # The first and the last in order differ first. A row's last token has to be read by itself, for its logits.
    prompts = [tuple(text) for text, _ in texts]
    alike = min(shared(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
    rows = len(texts) * copies
    several = (rows > 1 and slots != 1) or width > 1
    first = alike if several and alike >= _WORTH_SHARING else 0
    tokens = max(len(text) + max_new - 1 for text, max_new in texts) - first
    different, source = len({tuple(each) for each in sources}), max(map(len, sources), default=0)

    def needed(count: int) -> int:
        kept = min(count, different)
        return decoding_bytes(architecture, count * width, tokens, kept, source, itemsize, shared=first)

    if slots is None:
        free, slots = free_bytes(device), max(1, _MOST_ROWS // width)
        while free is not None and slots > 1 and needed(slots) > free * _SHARE:
            slots -= 1
    slots = min(slots, rows)
    check_room(needed(slots), slots * width, first + tokens, device)
    # Gathering costs every step something, and is worth it where memory or about half of the encoding is saved.
    mapped = bool(sources) and (different < slots or 2 * different <= rows)
    return SlotPlan(slots, width, tokens, first, min(slots, different), source, mapped, needed(slots))


class Slots:
    """Rows in flight in a cache that never grows.

    Args:
        model: has a causal decoder and a language head; or the engine that stands in its place.
        plan: the sizes.
        beginning: the tokens that all rows share, as many as the plan says.

    Raises:
        LatheError: no memory for the cache.
    """

    def __init__(self, model: Reader, plan: SlotPlan, beginning: Sequence[int] = ()) -> None:
        self.model, self.plan = model, plan
        assert model.architecture.decoder is not None
        spec, rows = model.architecture.decoder.attention, plan.slots * plan.width
        how: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        try:
            self.cache = Cache(model.architecture, rows, plan.tokens, **how)
            shape = (plan.sources, spec.kv_heads, plan.source, spec.d_head)
            self.cache.memory = [
                LayerCache(None, *(torch.zeros(shape, **how) for _ in range(2))) for _ in self.cache.memory
            ]
            if plan.shared:
                first = Cache(model.architecture, 1, plan.shared, **how)
                next_logits(model, torch.tensor([list(beginning)], device=model.device), None, first, None)
                self.cache.begin_with(first)
        except RuntimeError as error:  # what torch raises on every device when memory runs out
            raise LatheError(
                f"a cache for {rows:,} rows of {plan.tokens:,} tokens does not fit into memory; "
                "ask for fewer new tokens, or for fewer slots"
            ) from error
        # Whose keys and values each row holds after those that all share.
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.sources: list[list[int]] = [[] for _ in range(plan.sources)]  # what is held of the encoder
        self.reads = [0] * plan.slots  # which of the sources each place's row reads
        self.used = 0

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of the first tokens are held, and in which row; the last one never counts, it has to be read."""
        own, free = tokens[self.plan.shared :], self.used * self.plan.width
        # Where two hold as many, the row that the next prompt takes comes first: nothing is copied then.
        order = sorted(range(len(self.held)), key=lambda row: row != free)
        found = [(shared(self.held[row], own), -rank, row) for rank, row in enumerate(order)]
        length, _, row = max(found)
        # Of another source nothing would be the same; a decoder beside an encoder starts from one token anyway.
        return self.plan.shared + (0 if self.cache.memory else min(length, len(own) - 1)), row

    def holds(self, source: Sequence[int]) -> bool:
        """Whether a source is there already and may be read by several places."""
        return self.plan.mapped and list(source) in self.sources

    def take(self, tokens: Sequence[int], length: int, row: int, source: Sequence[int] = ()) -> None:
        """Give the next free place to a prompt, with the first `length` of its tokens taken from `row`.

        A source that is not there yet is to be given to `read_prompts`.
        """
        own, to = tokens[self.plan.shared : length], self.used * self.plan.width
        if row != to:
            self._copy(self.cache.layers, slice(row, row + 1), slice(to, to + 1), len(own))
        self.held[to] = list(own)
        if source:
            self.reads[self.used] = self._place_of(list(source))
        self.used += 1

    def _place_of(self, source: list[int]) -> int:
        """Where a source is held, or from now on is to be held: it is in nobody's place that is in flight."""
        if not self.plan.mapped:
            self.sources[self.used] = source
            return self.used
        if source in self.sources:
            return self.sources.index(source)
        # There are as many places as different sources in flight, this one's included. An empty one goes first.
        free = [place for place in range(self.plan.sources) if place not in self.reads[: self.used]]
        place = min(free, key=lambda place: bool(self.sources[place]))
        self.sources[place] = source
        return place

    def read_prompts(self, prompts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] = ()) -> Tensor:
        """Read what is left of the prompts that took the last places; the logits of each one's next token, B × V.

        Args:
            prompts: whole.
            sources: what the encoder reads for each; none where all of them are held already.
        """
        width, first = self.plan.width, self.used - len(prompts)
        rows = range(first * width, self.used * width, width)
        rest = [list(prompt[self.plan.shared + len(self.held[row]) :]) for row, prompt in zip(rows, prompts)]
        ids_BT, mask_BT = self._padded(rest, left=True)
        # The columns of the rest may stand over the shared part of a longer row: what is read ends with the longest.
        longest = max(map(len, prompts)) - self.plan.shared
        cache = self._part(first, len(prompts), longest - ids_BT.shape[1], every=width)
        memory = None
        if sources:
            ids_BS, mask_BS = self._padded(sources, left=False)
            with torch.no_grad():
                memory = self.model.encode(ids_BS, mask_BS)
            into = self.reads[first : self.used]
            cache.memory = [_Filling(*layer.read(), into) for layer in self.cache.memory]
        elif self.cache.memory:
            memory = self._read_sources(cache, first)
        logits_BV = next_logits(self.model, ids_BT, mask_BT, cache, memory)
        for row, ids in zip(rows, rest):
            self.held[row] += ids
            for copy in range(row + 1, row + width):
                self.held[copy] = list(self.held[row])
            if width > 1:
                self._copy(self.cache.layers, slice(row, row + 1), slice(row + 1, row + width), len(self.held[row]))
        return logits_BV

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of every row in flight; the logits of the one after, B × V."""
        in_flight = self.held[: self.used * self.plan.width]
        cache = self._part(0, len(in_flight), max(map(len, in_flight)))
        memory = self._read_sources(cache, 0) if cache.memory else None
        ids_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        logits_BV = next_logits(self.model, ids_B1, None, cache, memory)
        for held, token in zip(in_flight, tokens):
            held.append(token)
        return logits_BV

    def swap(self, rows: Sequence[int]) -> None:
        """Make row i of those in flight a copy of the old row `rows[i]`, a row of the same place (beams)."""
        in_flight = self.held[: len(rows)]
        self._part(0, len(rows), max(map(len, in_flight))).swap(torch.tensor(rows, device=self.model.device))
        self.held[: len(rows)] = [list(in_flight[row]) for row in rows]

    def leave(self, place: int) -> None:
        """Free a place; the last one in flight moves there. What the last place held stays to be shared."""
        self.used -= 1
        if place == self.used:
            return
        width = self.plan.width
        here, last = (slice(at * width, (at + 1) * width) for at in (place, self.used))
        self._copy(self.cache.layers, last, here, max(map(len, self.held[last])))
        self.held[here] = [list(held) for held in self.held[last]]
        if self.plan.mapped:
            self.reads[place] = self.reads[self.used]
        elif self.cache.memory:
            length = len(self.sources[self.used])
            self._copy(self.cache.memory, slice(self.used, self.used + 1), slice(place, place + 1), length)
            self.sources[place] = self.sources[self.used]

    def _copy(self, layers: Sequence[LayerCache], rows: slice, to: slice, length: int) -> None:
        for layer in layers:
            for tensor in layer.read():
                tensor[to, :, :length] = tensor[rows, :, :length]

    def _part(self, first: int, count: int, filled: int, every: int = 1) -> Cache:
        """`count` of the rows from place `first` on."""
        start = first * self.plan.width
        lengths = [len(held) for held in self.held[start : start + every * count : every]]
        return self.cache.part(start, torch.tensor(lengths, device=self.model.device), filled, every)

    def _read_sources(self, cache: Cache, first: int) -> Memory:
        """Let a part of the cache read the sources of the places from `first` on, which are all there."""
        reads = self.reads[first : self.used]
        lengths = [len(self.sources[source]) for source in reads]
        longest, device = max(lengths), self.model.device
        where: slice | Tensor = slice(first, self.used) if not self.plan.mapped else torch.tensor(reads, device=device)
        cache.memory = [_Held(*layer.read(), where, longest) for layer in self.cache.memory]
        seen_BS = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        # Nothing of the encoder's output is read but its shape.
        nothing = torch.empty(len(reads), longest, 0, dtype=self.model.dtype, device=device)
        return Memory(nothing, seen_BS.long())

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

    def __init__(self, k_BGSK: Tensor, v_BGSK: Tensor, rows: Sequence[int]) -> None:
        super().__init__()
        self._into, self._rows = (k_BGSK, v_BGSK), torch.tensor(rows, device=k_BGSK.device)

    def write(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store them; return them."""
        for into, new in zip(self._into, (k_BGTK, v_BGTK)):
            into[self._rows, :, : new.shape[2]] = new
        return k_BGTK, v_BGTK


class _Held(LayerCache):
    """Rows of cross-attention's keys and values: a slice, or gathered when they are read, one layer's at a time."""

    def __init__(self, k_BGSK: Tensor, v_BGSK: Tensor, rows: slice | Tensor, longest: int) -> None:
        super().__init__(None, k_BGSK, v_BGSK)
        self._rows, self._longest = rows, longest

    def read(self) -> tuple[Tensor, Tensor]:
        """Of the chosen rows, up to the longest source."""
        k_BGSK, v_BGSK = (tensor[:, :, : self._longest][self._rows] for tensor in super().read())
        return k_BGSK, v_BGSK


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts start with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
