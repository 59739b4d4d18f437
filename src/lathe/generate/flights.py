"""How the rows that take turns choose their tokens: one at a time, or as the beams of each prompt.

Both know the places and the rows in flight, of which number i stands at place i. `begin` chooses the first tokens of
rows whose prompts were just read, `go_on` reads the last tokens of all and chooses the next, `leave` gives the texts of
a row that is done and lets the last row take its place.

Rows are at different steps, so what judges by a row's text judges it alone; the rest sees all rows at once.

Shape suffixes: B rows, V vocabulary, N numbers, P prompts, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lathe.generate.beams import Searches, candidates
from lathe.generate.draw import draw
from lathe.generate.filters import pipeline
from lathe.generate.history import History
from lathe.generate.settings import SAMPLING, Settings
from lathe.generate.single import refuse_nothing_left
from lathe.generate.slots import Slots
from lathe.generate.stops import StopStrings


@dataclass
class Flight:
    """A row that waits or is in flight, or the beams of a prompt.

    Args:
        text: the prompt of the decoder; where there is one text, its new tokens too.
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
    done: bool = False


@dataclass(frozen=True)
class Text:
    """A finished text; fields as in `lathe.generate.continuous.Row`."""

    ids: list[int]
    ended: bool
    log_probs: list[float]
    score: float


class InTurn(Protocol):
    """A way to choose tokens for rows that take turns."""

    slots: Slots
    flights: list[Flight]

    def begin(self, came: list[Flight], logits_BV: Tensor) -> None:
        """Choose the first token of rows that took the last places, and mark those that are done."""
        ...

    def go_on(self) -> None:
        """Choose one more token of every row in flight, and mark those that are done."""
        ...

    def leave(self, place: int) -> tuple[Flight, list[Text]]:
        """The row at a place, which becomes free, and its texts, the best first."""
        ...


class _Filters:
    """The filters of rows that are at different steps."""

    def __init__(self, settings: Settings) -> None:
        filters, alike = pipeline(settings), {*SAMPLING, "renormalize_logits"}
        self._judging = [each for each in filters if each.name not in alike]
        self._shaping = [each for each in filters if each.name in alike]

    def __call__(self, logits_BV: Tensor, flights: list[Flight]) -> Tensor:
        width = len(logits_BV) // len(flights)
        for change in self._judging:
            each = logits_BV.split(width)
            logits_BV = torch.cat([change(own_BV, flight.at) for own_BV, flight in zip(each, flights)])
        for change in self._shaping:
            logits_BV = change(logits_BV, flights[0].at)
        return logits_BV


class OneInTurn:
    """One token a row and step: the likeliest, or a draw."""

    def __init__(self, slots: Slots, settings: Settings, stops: StopStrings | None) -> None:
        self.slots, self.settings, self.stops = slots, settings, stops
        self.flights: list[Flight] = []
        self._filters = _Filters(settings)

    def begin(self, came: list[Flight], logits_BV: Tensor) -> None:
        """As `InTurn` says."""
        self.flights += came
        self._choose(came, logits_BV)

    def go_on(self) -> None:
        """As `InTurn` says."""
        self._choose(self.flights, self.slots.step([flight.text[-1] for flight in self.flights]))

    def leave(self, place: int) -> tuple[Flight, list[Text]]:
        """As `InTurn` says."""
        flight = _taken(self.flights, place)
        self.slots.leave(place)
        return flight, [Text(flight.new, flight.stopped, flight.log_probs, sum(flight.log_probs))]

    def _choose(self, rows: list[Flight], logits_BV: Tensor) -> None:
        left_BV = self._filters(logits_BV, rows)
        steps_B = torch.tensor([len(row.new) for row in rows])
        refuse_nothing_left(left_BV.amax(dim=-1), steps_B, [row.number for row in rows])
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
            row.done = row.stopped or len(row.new) == row.max_new


class BeamsInTurn:
    """The beams of each prompt: as many rows of its place.

    Args:
        longest: how many tokens the texts of any prompt have at most.
    """

    def __init__(self, slots: Slots, settings: Settings, stops: StopStrings | None, longest: int) -> None:
        self.slots, self.settings, self.stops, self.longest = slots, settings, stops, longest
        self.flights: list[Flight] = []
        self._filters = _Filters(settings)
        self._searches = self._new([])
        self._tokens: list[int] = []  # the last of every row in flight

    def begin(self, came: list[Flight], logits_BV: Tensor) -> None:
        """As `InTurn` says."""
        searches = self._new(came)
        # All beams of a prompt start as copies of one row, so nothing has to be moved.
        _, tokens = self._choose(came, searches, logits_BV.repeat_interleave(self.settings.num_beams, dim=0))
        self.flights += came
        self._searches.join(searches)
        self._tokens += tokens

    def go_on(self) -> None:
        """As `InTurn` says."""
        rows, self._tokens = self._choose(self.flights, self._searches, self.slots.step(self._tokens))
        self.slots.swap(rows)

    def leave(self, place: int) -> tuple[Flight, list[Text]]:
        """As `InTurn` says."""
        best = self._searches.best([place], [self.flights[place].number])
        texts = [
            Text(
                best.ids_PNT[0, rank, :length].tolist(),
                bool(best.ended_PN[0, rank]),
                best.log_probs_PNT[0, rank, :length].tolist(),
                float(best.scores_PN[0, rank]),
            )
            for rank, length in enumerate(best.lengths_PN[0].tolist())
        ]
        width, last = self.settings.num_beams, len(self.flights) - 1
        self._tokens[place * width : (place + 1) * width] = self._tokens[last * width :]
        del self._tokens[last * width :]
        order = list(range(last))
        if place < last:
            order[place] = last
        self._searches.keep(torch.tensor(order, dtype=torch.long, device=best.scores_PN.device))
        self.slots.leave(place)
        return _taken(self.flights, place), texts

    def _new(self, came: list[Flight]) -> Searches:
        most = torch.tensor([flight.max_new for flight in came], dtype=torch.long, device=self.slots.model.device)
        return Searches(self.settings, most, self.longest)

    def _choose(self, flights: list[Flight], searches: Searches, logits_BV: Tensor) -> tuple[list[int], list[int]]:
        """Which row each new beam continues, and its token."""
        log_probs_BV = logits_BV.log_softmax(dim=-1)
        scores_BV, n_candidates = self._filters(log_probs_BV, flights), candidates(self.settings)
        drawn = [
            flight.u_N[flight.at.n_new * n_candidates : (flight.at.n_new + 1) * n_candidates]
            for flight in flights
            if flight.u_N is not None
        ]

        def ends(number: int, parents_PK: Tensor, tokens_PK: Tensor) -> Tensor:
            """Where a stop string stands, prompts included."""
            assert self.stops is not None
            first = number * (self.settings.num_beams // self.settings.num_beam_groups)
            found = []
            for flight, parents, tokens in zip(flights, parents_PK.tolist(), tokens_PK.tolist()):
                texts = flight.at.ids_BT[first:].tolist()
                pairs = zip(parents, tokens)
                found.append([self.stops.completed([*texts[row], token]) is not None for row, token in pairs])
            return torch.tensor(found, device=tokens_PK.device)

        names = [flight.number for flight in flights]
        u_PK = torch.stack(drawn) if drawn else None
        rows_B, tokens_B = searches.advance(scores_BV, log_probs_BV, u_PK, None if self.stops is None else ends, names)
        over, width = searches.over_P.tolist(), self.settings.num_beams
        for place, flight in enumerate(flights):
            own = slice(place * width, (place + 1) * width)
            flight.at.reorder(rows_B[own] - place * width)
            flight.at.append(tokens_B[own])
            flight.done = over[place]
        return rows_B.tolist(), tokens_B.tolist()


def _taken(flights: list[Flight], place: int) -> Flight:
    """Take a row out; the last one gets its place."""
    flight, last = flights[place], flights.pop()
    if last is not flight:
        flights[place] = last
    return flight
