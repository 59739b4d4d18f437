"""Many prompts through few places: a row leaves when it is done, and the next one takes its place.

A batch that is decoded as a whole runs as long as its longest row, and the rest of it computes nothing that anyone
reads. Here rows come and go between steps (Orca's iteration-level scheduling; Yu et al. 2022, §3.1), through a
cache whose memory is planned before the first token and never grows (`lathe.generate.slots`).

One round: rows that wait are given the free places and their prompts are read, as many as fit one pass; every
row in flight gets one more token; those that have ended leave. A prompt whose beginning a place holds is read from
there on. Where one that waits shares its beginning with one that is about to be read, it waits for that pass.

A row's text depends on its own prompt, its own seed and the settings, and so on neither its neighbours, nor the
number of places, nor the order.

Shape suffixes: B rows, T positions, V vocabulary, N numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.decode import evaluating, resolve_settings, stop_strings
from lathe.generate.draw import draw, numbers
from lathe.generate.filters import pipeline
from lathe.generate.history import History
from lathe.generate.prompt import Prompt, make_prompt, room, start
from lathe.generate.settings import SAMPLING, Settings
from lathe.generate.slots import Slots, plan_slots, shared
from lathe.generate.stops import StopStrings
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
        number: of the prompt, from 0 in the order given; with several samples a prompt, of the sample.
        ids: the new tokens, an end-of-sequence token included.
        ended: whether that or a stop string ended it, and not the length.
        log_probs: of each token under the model, before temperature and any filter.
    """

    number: int
    ids: list[int]
    ended: bool
    log_probs: list[float]


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
    **settings: Any,
) -> Iterator[Row]:
    """Each row as it finishes; closing the iterator ends the work.

    Args:
        model: a decoder or an encoder-decoder with a language head.
        prompts: ids of any lengths, without pads; the encoder's input where there is one.
        slots: how many rows go at once; as many as half of the free memory holds where left out, at most 64.
        stored: the settings that came with the model; `settings` go before them.
        tokenizer: what `stop_strings` are looked for with; the model's own where it has one.
        settings: as for `lathe.generate.generate`, each row as if it were alone: `max_length` counts its own tokens.

    Raises:
        RequestError: beams, which have no rows of their own, or what `generate` refuses; before any row is decoded.
    """
    resolved = resolve_settings(model, settings, stored)
    if resolved.num_beams > 1:
        raise RequestError(
            f"num_beams={resolved.num_beams}: rows that take turns are decoded one token at a time; pass num_beams=1, "
            "or decode the prompts as one batch"
        )
    if slots is not None and slots < 1:
        raise RequestError(f"slots={slots}: expected at least 1")
    waiting = _waiting(model, prompts, resolved)
    plan = plan_slots(
        model.architecture,
        len(waiting),
        max(len(row.text) + row.max_new - 1 for row in waiting),
        max(len(row.source) for row in waiting),
        slots=slots,
        itemsize=model.dtype.itemsize,
        device=model.device,
    )
    batch = _Batch(Slots(model, plan), waiting, resolved, stop_strings(model, tokenizer, resolved))
    return _run(model, batch)


def _run(model: Transformer, batch: _Batch) -> Iterator[Row]:
    with evaluating(model):
        yield from batch.run()


@dataclass
class _Flight:
    """A row that waits or is in flight.

    Args:
        text: the decoder's tokens so far.
        source: the encoder's; empty without one.
        at: the same as the filters read it.
        u_N: what it draws with.
    """

    number: int
    text: list[int]
    source: list[int]
    max_new: int
    at: History
    u_N: Tensor | None
    new: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.new) == self.max_new

    def row(self) -> Row:
        return Row(self.number, self.new, self.stopped, self.log_probs)


def _waiting(model: Transformer, prompts: Sequence[Sequence[int]], settings: Settings) -> deque[_Flight]:
    """A row for every sample of every prompt, after refusing what cannot be decoded."""
    if not prompts:
        raise RequestError("there is no prompt; give at least one row of token ids")
    found: list[tuple[Prompt, Prompt | None, int]] = []
    for number, ids in enumerate(prompts):
        given = torch.tensor([list(ids)], dtype=torch.long)
        vocab_size = model.architecture.embedding.vocab_size
        read = make_prompt(f"prompt {number + 1}", given, torch.ones_like(given), settings, vocab_size, model.device)
        if model.encoder is None:
            found.append((read, None, room(read, settings, model.architecture)))
            continue
        first = settings.decoder_start_token_id
        token = first if first is not None else settings.bos_token_id
        begun = start(1, "decoder_start_token_id", token, model.device)
        found.append((begun, read, room(begun, settings, model.architecture)))
    copies, longest = settings.num_return_sequences, max(max_new for _, _, max_new in found)
    u_BN = None
    if settings.do_sample:
        u_BN = numbers(settings, len(found), longest, model.device, copies=copies)
    return deque(
        _Flight(
            number * copies + copy,
            prompt.ids_BT[0].tolist(),
            [] if source is None else source.ids_BT[0].tolist(),
            max_new,
            History.of(prompt, prompt.columns, max_new, source),
            None if u_BN is None else u_BN[number * copies + copy],
        )
        for number, (prompt, source, max_new) in enumerate(found)
        for copy in range(copies)
    )


class _Batch:
    """The rows in flight, each at the place of its number in `flights`, and those that wait."""

    def __init__(self, slots: Slots, waiting: deque[_Flight], settings: Settings, stops: StopStrings | None) -> None:
        self.slots, self.waiting, self.settings, self.stops = slots, waiting, settings, stops
        self.flights: list[_Flight] = []
        filters = pipeline(settings)
        # Rows are at different steps, so what judges by a row's text judges it alone; the rest sees all at once.
        alike = {*SAMPLING, "renormalize_logits"}
        self._judging = [each for each in filters if each.name not in alike]
        self._shaping = [each for each in filters if each.name in alike]

    def run(self) -> Iterator[Row]:
        """Decode until nothing waits and nothing is in flight."""
        while self.waiting or self.flights:
            if self.flights:
                self._choose(self.flights, self.slots.step([flight.text[-1] for flight in self.flights]))
                yield from self._leave()
            while self.waiting and len(self.flights) < self.slots.plan.slots:
                came = self._admit()
                logits_BV = self.slots.read_prompts(
                    [flight.text for flight in came], [flight.source for flight in came if flight.source]
                )
                self._choose(came, logits_BV)
                yield from self._leave()

    def _admit(self) -> list[_Flight]:
        """Give places to rows that wait, as many as are read in one pass; at least one."""
        came: list[_Flight] = []
        longest = 0  # tokens of any that are still to be read
        while self.waiting and len(self.flights) < self.slots.plan.slots:
            row = self.waiting[0]
            length, place = self.slots.longest_prefix(row.text)
            to_read = max(longest, len(row.text) - length, len(row.source))
            alike = 0 if row.source else max((shared(row.text, other.text) for other in came), default=0)
            if came and ((len(came) + 1) * to_read > _AT_ONCE or alike - length >= _WORTH_WAITING):
                break
            longest = to_read
            self.slots.take(row.text, length, place)
            came.append(self.waiting.popleft())
            self.flights.append(came[-1])
        return came

    def _choose(self, rows: list[_Flight], logits_BV: Tensor) -> None:
        """One more token of each row."""
        left_BV = logits_BV
        for change in self._judging:
            left_BV = torch.cat([change(left_BV[i : i + 1], row.at) for i, row in enumerate(rows)])
        for change in self._shaping:
            left_BV = change(left_BV, rows[0].at)
        for i in left_BV.amax(dim=-1).isneginf().nonzero()[:, 0].tolist():
            raise RequestError(
                f"the settings leave row {rows[i].number} no token to choose as new token {len(rows[i].new) + 1}; "
                "ban fewer tokens or n-grams, or ask for fewer new tokens"
            )
        drawn = [row.u_N[len(row.new)] for row in rows if row.u_N is not None]
        chosen_B = draw(left_BV, torch.stack(drawn)) if drawn else left_BV.argmax(dim=-1)
        log_probs_B = logits_BV.log_softmax(dim=-1).gather(1, chosen_B[:, None])[:, 0]
        for i, (row, token, log_prob) in enumerate(zip(rows, chosen_B.tolist(), log_probs_B.tolist())):
            row.at.append(chosen_B[i : i + 1])
            row.text.append(token)
            row.new.append(token)
            row.log_probs.append(log_prob)
            row.stopped = token in self.settings.eos_token_id or (
                self.stops is not None and self.stops.completed(row.text) is not None
            )

    def _leave(self) -> Iterator[Row]:
        """Free the places of the rows that are done."""
        for place in range(len(self.flights) - 1, -1, -1):
            row = self.flights[place]
            if not row.done:
                continue
            self.slots.leave(place)
            last = self.flights.pop()
            if last is not row:
                self.flights[place] = last
            yield row.row()
