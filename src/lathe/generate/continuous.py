"""Many prompts through few places: a row leaves when it is done, and the next one takes its place.

A batch that is decoded as a whole runs as long as its longest row, and the rest of it computes nothing that anyone
reads. Here rows come and go between steps (Orca's iteration-level scheduling; Yu et al. 2022, §3.1), through a
cache whose memory is planned before the first token and never grows (`lathe.generate.slots`).

One round: rows that wait are given the free places and their prompts are read, as many as fit one pass; every
row in flight gets one more token; those that have ended leave. With beams, the `num_beams` rows of a prompt come and
go together. What prompts share is read once: where one that waits begins like one that is about to be read, or has its
source, it waits for that pass.

A row's text depends on its own prompt, its own seed and the settings, and so on neither its neighbours, nor the
number of places, nor the order.

Shape suffixes: B rows, T positions, V vocabulary, N numbers, P prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lathe.engine import Engine
from lathe.engine.choose import reader
from lathe.errors import RequestError
from lathe.generate.beams import candidates
from lathe.generate.decode import evaluating, resolve_settings, stop_strings
from lathe.generate.draw import numbers
from lathe.generate.flights import BeamsInTurn, Flight, InTurn, OneInTurn
from lathe.generate.history import History
from lathe.generate.prompt import Prompt, make_prompt, room, start
from lathe.generate.settings import Settings
from lathe.generate.slots import Slots, plan_slots, shared
from lathe.model.transformer import Transformer
from lathe.text.tokenizer import Tokenizer

# Tokens, pads counted, that one pass over prompts reads at most, unless a single prompt is longer.
_AT_ONCE = 4096
# So many tokens alike are worth another pass.
_WORTH_WAITING = 8


@dataclass(frozen=True)
class Row:
    """One finished row.

    Args:
        number: of the prompt, from 0 in the order given; with several samples or beams a prompt, of the text.
        ids: the new tokens, an end-of-sequence token included.
        ended: whether that or a stop string ended it, and not the length.
        log_probs: of each token under the model, before temperature and any filter.
        score: the sum of these; for beams what they are ranked by.
    """

    number: int
    ids: list[int]
    ended: bool
    log_probs: list[float]
    score: float


def decode_rows(model: Transformer, prompts: Sequence[Sequence[int]], **options: Any) -> list[Row]:
    """All rows in the order of the prompts; arguments and errors as for `rows_as_finished`.

    >>> import lathe
    >>> from lathe.generate.continuous import decode_rows
    >>> tiny = lathe.preset("gpt2").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=64)
    >>> model = lathe.Model(tiny.with_({"tokens.eos": [], "tokens.bos": None}), seed=0)
    >>> rows = decode_rows(model, [[5, 6, 1], [7], [8, 9]], slots=2, max_new_tokens=4)
    >>> [(row.number, len(row.ids)) for row in rows]
    [(0, 4), (1, 4), (2, 4)]
    """
    return sorted(rows_as_finished(model, prompts, **options), key=lambda row: row.number)


def rows_as_finished(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int | None = None,
    stored: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    engine: str | Engine = "auto",
    **settings: Any,
) -> Iterator[Row]:
    """Each row as it finishes; closing the iterator ends the work.

    Args:
        model: a decoder or an encoder-decoder with a language head.
        prompts: ids of any lengths, without pads; the encoder's input where there is one.
        slots: how many rows go at once, or with beams how many prompts; as many as half of the free memory holds
            where left out, at most 64 rows.
        stored: the settings that came with the model; `settings` go before them.
        tokenizer: what `stop_strings` are looked for with; the model's own where it has one.
        engine: what computes the passes, as for `generate`.
        settings: as for `lathe.generate.generate`, each row as if it were alone: `max_length` counts its own tokens.

    Raises:
        RequestError: what `generate` refuses, more slots than the memory holds; before any row is decoded.
    """
    resolved, through = resolve_settings(model, settings, stored), reader(model, engine)
    if slots is not None and slots < 1:
        raise RequestError(f"slots={slots}: expected at least 1")
    found = _prompts(model, prompts, resolved)
    copies = resolved.num_return_sequences if resolved.num_beams == 1 else 1
    plan = plan_slots(
        model.architecture,
        [(each.text, each.max_new) for each in found],
        [each.source for each in found if each.source],
        copies=copies,
        slots=slots,
        width=resolved.num_beams,
        itemsize=model.dtype.itemsize,
        device=model.device,
    )
    stops, longest = stop_strings(model, tokenizer, resolved), max(each.max_new for each in found)
    waiting = _waiting(found, resolved, copies, longest, model.device)

    def begin() -> _Batch:
        places = Slots(through, plan, waiting[0].text[: plan.shared])
        if resolved.num_beams > 1:
            return _Batch(waiting, BeamsInTurn(places, resolved, stops, longest))
        return _Batch(waiting, OneInTurn(places, resolved, stops))

    return _run(model, begin)


def _run(model: Transformer, begin: Callable[[], _Batch]) -> Iterator[Row]:
    with evaluating(model):
        yield from begin().run()


@dataclass(frozen=True)
class _Start:
    """What the rows of one prompt start with."""

    prompt: Prompt
    read: Prompt | None  # by the encoder
    max_new: int

    @property
    def text(self) -> list[int]:
        ids: list[int] = self.prompt.ids_BT[0].tolist()
        return ids

    @property
    def source(self) -> list[int]:
        ids: list[int] = [] if self.read is None else self.read.ids_BT[0].tolist()
        return ids


def _prompts(model: Transformer, prompts: Sequence[Sequence[int]], settings: Settings) -> list[_Start]:
    """The prompts, after refusing what cannot be decoded."""
    if not prompts:
        raise RequestError("there is no prompt; give at least one row of token ids")
    found: list[_Start] = []
    encoder, vocab_size = model.architecture.encoder, model.architecture.embedding.vocab_size
    most = None if encoder is None else encoder.positions.limit
    for number, ids in enumerate(prompts):
        given, name = torch.tensor([list(ids)], dtype=torch.long), f"prompt {number + 1}"
        read = make_prompt(name, given, torch.ones_like(given), settings, vocab_size, model.device)
        if encoder is None:
            found.append(_Start(read, None, room(read, settings, model.architecture, name)))
            continue
        if most is not None and read.longest > most:
            raise RequestError(f"{name} has {read.longest} tokens, more than this model's {most} positions: shorten it")
        first = settings.decoder_start_token_id
        token = first if first is not None else settings.bos_token_id
        begun = start(1, "decoder_start_token_id", token, model.device)
        found.append(_Start(begun, read, room(begun, settings, model.architecture)))
    return found


def _waiting(
    found: Sequence[_Start], settings: Settings, copies: int, longest: int, device: torch.device
) -> deque[Flight]:
    """A row for every sample of every prompt, or for its beams."""
    u_BN = None
    if settings.do_sample:
        count = longest * (1 if settings.num_beams == 1 else candidates(settings))
        u_BN = numbers(settings, len(found), count, device, copies=copies)
    return deque(
        Flight(
            number * copies + copy,
            each.text,
            each.source,
            each.max_new,
            History.of(each.prompt, each.prompt.columns, each.max_new, each.read, copies=settings.num_beams),
            None if u_BN is None else u_BN[number * copies + copy],
        )
        for number, each in enumerate(found)
        for copy in range(copies)
    )


class _Batch:
    """The rows that wait, and the places that they take."""

    def __init__(self, waiting: deque[Flight], turns: InTurn) -> None:
        self.waiting, self.turns, self.slots = waiting, turns, turns.slots

    def run(self) -> Iterator[Row]:
        """Decode until nothing waits and nothing is in flight."""
        while self.waiting or self.turns.flights:
            if self.turns.flights:
                self.turns.go_on()
                yield from self._leave()
            while self.waiting and len(self.turns.flights) < self.slots.plan.slots:
                came, sources = self._admit()
                self.turns.begin(came, self.slots.read_prompts([flight.text for flight in came], sources))
                yield from self._leave()

    def _admit(self) -> tuple[list[Flight], list[list[int]]]:
        """Give places to rows that wait, as many as are read in one pass, at least one; and the sources to encode."""
        came: list[Flight] = []
        sources: list[list[int]] = []
        longest = 0  # tokens of any that are still to be read
        while self.waiting and len(self.turns.flights) + len(came) < self.slots.plan.slots:
            row = self.waiting[0]
            length, place = self.slots.longest_prefix(row.text)
            held = self.slots.holds(row.source)
            to_read = max(longest, len(row.text) - length, 0 if held else len(row.source))
            alike = 0 if row.source else max((shared(row.text, other.text) for other in came), default=0)
            if came and ((len(came) + 1) * to_read > _AT_ONCE or alike - length >= _WORTH_WAITING):
                break
            # A pass encodes the sources of all its rows or of none; one that is encoded in it is there after it.
            if came and row.source and held != (not sources):
                break
            longest = to_read
            self.slots.take(row.text, length, place, row.source)
            came.append(self.waiting.popleft())
            if row.source and not held:
                sources.append(row.source)
        return came, sources

    def _leave(self) -> Iterator[Row]:
        """Free the places of the rows that are done."""
        for place in range(len(self.turns.flights) - 1, -1, -1):
            if not self.turns.flights[place].done:
                continue
            flight, texts = self.turns.leave(place)
            for rank, text in enumerate(texts):
                yield Row(flight.number * len(texts) + rank, text.ids, text.ended, text.log_probs, text.score)
