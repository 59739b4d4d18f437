"""Beam search: follow the `num_beams` likeliest unfinished texts at once (Sutskever et al. 2014, §3.2).

At each step every beam is continued with every token, and the best of all continuations are kept. A continuation
that ends goes to the finished texts, under its score: its log-probability over its length to the power
`length_penalty` (Wu et al. 2016, §7, in `transformers`' simpler form); an unfinished one becomes a beam. A row is
over once its finished texts cannot be bettered, which `early_stopping` judges.

With `num_beam_groups` a row has several searches, one after the other in each step; a token costs a group
`diversity_penalty` for each time that the groups before it have just chosen it, and so they part (Vijayakumar et
al. 2018, §4). With `do_sample` the continuations are drawn without replacement, not the best taken.

The order of these steps, and which ties to the length are counted where, follow `transformers`, so that the texts
are the same. Rows of a batch never look at one another, and each counts its own tokens, so prompts may join and leave
between steps: `search` has all of them from the first step to the last, `lathe.generate.continuous` lets them take
turns.

Shape suffixes: P prompts, N beams of a group, K candidates, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.draw import draw_several, numbers
from lathe.generate.filters import pipeline
from lathe.generate.settings import Settings
from lathe.generate.single import Task, refuse_nothing_left
from lathe.generate.watch import Continuations, Watch

# Of a group's number, the beams that its candidates continue and their tokens (P × K both): which ones a stop string
# ends.
Ends = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Texts:
    """New tokens of several texts of each prompt, and what they are worth.

    Args:
        scores_PN: what they are ranked by; -inf where there is no text.
        ids_PNT: the tokens.
        log_probs_PNT: of each under the model, before any filter.
        lengths_PN: how many of the tokens are the text's.
        ended_PN: whether an end-of-sequence token or a stop string ended it, and not the length.
    """

    scores_PN: Tensor
    ids_PNT: Tensor
    log_probs_PNT: Tensor
    lengths_PN: Tensor
    ended_PN: Tensor

    @classmethod
    def none(cls, prompts: int, n: int, length: int, filler: int, device: torch.device) -> Texts:
        """Room for `n` texts of each prompt, with no text in it."""
        return cls(
            torch.full((prompts, n), -torch.inf, device=device),
            torch.full((prompts, n, length), filler, dtype=torch.long, device=device),
            torch.zeros(prompts, n, length, device=device),
            torch.zeros(prompts, n, dtype=torch.long, device=device),
            torch.zeros(prompts, n, dtype=torch.bool, device=device),
        )

    def take(self, which_PN: Tensor) -> Texts:
        """Some of the texts of each prompt."""
        which_PNT = which_PN[..., None].expand(-1, -1, self.ids_PNT.shape[-1])
        return Texts(
            self.scores_PN.gather(1, which_PN),
            self.ids_PNT.gather(1, which_PNT),
            self.log_probs_PNT.gather(1, which_PNT),
            self.lengths_PN.gather(1, which_PN),
            self.ended_PN.gather(1, which_PN),
        )

    def best(self, n: int) -> Texts:
        """The `n` texts of each prompt with the highest scores, the best first."""
        return self.take(self.scores_PN.topk(n, dim=1).indices)

    @staticmethod
    def joined(parts: Sequence[Texts], dim: int = 1) -> Texts:
        """The texts of all, prompt by prompt; with `dim=0`, the prompts of all one after the other."""
        return Texts(
            torch.cat([each.scores_PN for each in parts], dim),
            torch.cat([each.ids_PNT for each in parts], dim),
            torch.cat([each.log_probs_PNT for each in parts], dim),
            torch.cat([each.lengths_PN for each in parts], dim),
            torch.cat([each.ended_PN for each in parts], dim),
        )

    def of(self, order_P: Tensor) -> Texts:
        """Those of some prompts."""
        return Texts(
            self.scores_PN[order_P],
            self.ids_PNT[order_P],
            self.log_probs_PNT[order_P],
            self.lengths_PN[order_P],
            self.ended_PN[order_P],
        )


class Group:
    """The beams of one search for each prompt, and its finished texts.

    Args:
        number: of the group.
        max_new_P: how many tokens each prompt's texts have at most.
        watch: told of each step; only where all prompts are at the same one.
    """

    def __init__(self, settings: Settings, number: int, max_new_P: Tensor, most: int, watch: Watch | None) -> None:
        self.settings, self.number, self.watch, self.max_new_P = settings, number, watch, max_new_P
        self.size, prompts = settings.num_beams // settings.num_beam_groups, len(max_new_P)
        device = max_new_P.device
        self.ends = torch.tensor(settings.eos_token_id, dtype=torch.long, device=device)
        self.running = Texts.none(prompts, self.size, most, settings.filler, device)
        # All beams start alike, so only the first counts until they differ.
        self.running.scores_PN[:, 0] = 0.0
        self.finished = Texts.none(prompts, self.size, most, settings.filler, device)
        self.lengths_P = torch.zeros_like(max_new_P)
        self.final_P = torch.zeros(prompts, dtype=torch.bool, device=device)

    @property
    def over_P(self) -> Tensor:
        """Which prompts' finished texts are final."""
        return self.final_P | (self.lengths_P >= self.max_new_P)

    def keep(self, order_P: Tensor) -> None:
        """Keep some of the prompts, in this order."""
        self.running, self.finished = self.running.of(order_P), self.finished.of(order_P)
        self.max_new_P, self.lengths_P = self.max_new_P[order_P], self.lengths_P[order_P]
        self.final_P = self.final_P[order_P]

    def join(self, other: Group) -> None:
        """Add the prompts of another, after the own."""
        self.running = Texts.joined((self.running, other.running), 0)
        self.finished = Texts.joined((self.finished, other.finished), 0)
        self.max_new_P = torch.cat((self.max_new_P, other.max_new_P))
        self.lengths_P = torch.cat((self.lengths_P, other.lengths_P))
        self.final_P = torch.cat((self.final_P, other.final_P))

    def advance(
        self, scores_PNV: Tensor, log_probs_PNV: Tensor, u_PK: Tensor | None, ends: Ends | None, names: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Continue each beam by a token.

        Args:
            scores_PNV: what each token adds to a beam's score; -inf where it may not come.
            log_probs_PNV: the model's own log-probability of each.
            u_PK: the numbers to draw with; None takes the best.
            ends: finds the stop strings.
            names: what the prompts are called.

        Returns:
            Which beam each new beam continues, and its token, P × N both.
        """
        total_PX = (self.running.scores_PN[..., None] + scores_PNV).flatten(1)
        refuse_nothing_left(total_PX.amax(dim=1).masked_fill(self.over_P, 0), self.lengths_P, names)
        if u_PK is None:
            best_PK, places_PK = total_PX.topk(candidates(self.settings), dim=1)
        else:
            places_PK = draw_several(total_PX, u_PK)
            best_PK = total_PX.gather(1, places_PK)
        n_tokens = scores_PNV.shape[-1]
        parents_PK, tokens_PK = places_PK // n_tokens, places_PK % n_tokens
        found = self.running.take(parents_PK)
        found.scores_PN = best_PK
        last_PK = log_probs_PNV.flatten(1).gather(1, places_PK)
        # A row that is over may be at its full length; it is written over and never read again.
        at_PK1 = self.lengths_P.clamp(max=found.ids_PNT.shape[-1] - 1)[:, None, None].expand(-1, tokens_PK.shape[1], 1)
        found.ids_PNT.scatter_(2, at_PK1, tokens_PK[..., None])
        found.log_probs_PNT.scatter_(2, at_PK1, last_PK[..., None])
        found.lengths_PN = (self.lengths_P[:, None] + 1).expand_as(tokens_PK)
        found.ended_PN = torch.isin(tokens_PK, self.ends)
        if ends is not None:
            found.ended_PN = found.ended_PN | ends(self.number, parents_PK, tokens_PK)
        over_P = self.over_P
        finished_PK = self._finish(found, found.ended_PN | (self.lengths_P >= self.max_new_P - 1)[:, None], over_P)
        going_on_PK = best_PK.masked_fill(found.ended_PN, -torch.inf)
        chosen_PN = going_on_PK.topk(self.size, dim=1).indices
        if self.watch is not None:
            step, ids_PKT = int(self.lengths_P[0]), found.ids_PNT
            self.watch(
                Continuations(step, self.number, ids_PKT, parents_PK, last_PK, best_PK, finished_PK, chosen_PN, over_P)
            )
        found.scores_PN = going_on_PK
        self.running = found.take(chosen_PN)
        self.lengths_P = (self.lengths_P + 1).minimum(self.max_new_P)
        self._judge()
        return parents_PK.gather(1, chosen_PN), tokens_PK.gather(1, chosen_PN)

    def _finish(self, found: Texts, ended_PK: Tensor, over_P: Tensor) -> Tensor:
        """Keep the best of what has ended; of the candidates, only as many count as there are beams. Which counted."""
        scores_PK = found.scores_PN / found.lengths_PN**self.settings.length_penalty
        first_K = torch.arange(scores_PK.shape[1], device=scores_PK.device) < self.size
        counted_PK = ended_PK & first_K & ~over_P[:, None]
        ended = Texts(
            scores_PK.masked_fill(~counted_PK, -torch.inf),
            found.ids_PNT,
            found.log_probs_PNT,
            found.lengths_PN,
            found.ended_PN,
        )
        self.finished = Texts.joined([self.finished, ended]).best(self.size)
        return counted_PK

    def _judge(self) -> None:
        """Mark the rows whose finished texts are final, now that the beams have one more token."""
        penalty, early = self.settings.length_penalty, self.settings.early_stopping
        # "never" asks what a beam could still reach. False compares what it has, which is a good guess.
        hoped_P = self.max_new_P if early == "never" and penalty > 0 else self.lengths_P
        # As wide as a number of Python's, so that a length's power rounds as it does in `transformers`.
        power_P = (hoped_P.double() ** penalty).to(self.running.scores_PN.dtype)
        worst_P = self.finished.scores_PN.amin(dim=1)
        self.final_P = self.final_P | (self.running.scores_PN[:, 0] / power_P <= worst_P)
        if early is True:
            self.final_P = self.final_P | worst_P.isfinite()


def candidates(settings: Settings) -> int:
    """How many continuations a group looks at in each step: enough that its beams go on if the others all end."""
    return max(2, len(settings.eos_token_id) + 1) * (settings.num_beams // settings.num_beam_groups)


class Searches:
    """The searches of some prompts, each with as many beams as the settings say, at its own step.

    Args:
        max_new_P: how many tokens each prompt's texts have at most.
        most: the largest of these, also of prompts that join later.
        watch: told of each step; only where all prompts are at the same one.
    """

    def __init__(self, settings: Settings, max_new_P: Tensor, most: int, watch: Watch | None = None) -> None:
        self.settings = settings
        self.groups = [Group(settings, number, max_new_P, most, watch) for number in range(settings.num_beam_groups)]

    @property
    def over_P(self) -> Tensor:
        """Which prompts are done."""
        return torch.stack([group.over_P for group in self.groups]).all(dim=0)

    def keep(self, order_P: Tensor) -> None:
        """Keep some of the prompts, in this order."""
        for group in self.groups:
            group.keep(order_P)

    def join(self, other: Searches) -> None:
        """Add the prompts of another, after the own."""
        for own, its in zip(self.groups, other.groups):
            own.join(its)

    def advance(
        self,
        scores_BV: Tensor,
        log_probs_BV: Tensor,
        u_PK: Tensor | None = None,
        ends: Ends | None = None,
        names: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue each beam by a token.

        Args:
            scores_BV: what each token adds to the score of a beam, what may not come at -inf; a prompt's beams lie
                side by side.
            log_probs_BV: the model's own log-probability of each.
            u_PK: the numbers to draw with, as many as `candidates`; None takes the best.
            names: what the prompts are called; their places where left out.

        Returns:
            Which row each new beam continues, and its token, B both.
        """
        prompts = len(log_probs_BV) // self.settings.num_beams
        shape = (prompts, len(self.groups), self.settings.num_beams // len(self.groups), -1)
        scores_PGNV, log_probs_PGNV = scores_BV.view(shape), log_probs_BV.view(shape)
        parents: list[Tensor] = []
        chosen: list[Tensor] = []
        going_on: list[Tensor] = []  # of each of `chosen`: a group that has its texts already counts no more
        for number, group in enumerate(self.groups):
            scores_PNV = scores_PGNV[:, number]
            if chosen:
                times_P1V = _times(torch.cat(chosen, 1), torch.cat(going_on, 1), scores_PNV)
                scores_PNV = scores_PNV - self.settings.diversity_penalty * times_P1V
            over_P1 = group.over_P[:, None]
            given = log_probs_PGNV[:, number], u_PK, ends, range(prompts) if names is None else names
            parents_PN, tokens_PN = group.advance(scores_PNV, *given)
            parents.append(parents_PN + number * group.size)
            chosen.append(tokens_PN)
            going_on.append(~over_P1.expand_as(tokens_PN))
        first_P1 = torch.arange(prompts, device=scores_BV.device)[:, None] * self.settings.num_beams
        return (first_P1 + torch.cat(parents, 1)).flatten(), torch.cat(chosen, 1).flatten()

    def best(self, of_P: Sequence[int], names: Sequence[int]) -> Texts:
        """The `num_return_sequences` best finished texts of some prompts, the best first.

        Args:
            of_P: their places.
            names: what they are called.

        Raises:
            RequestError: the settings leave fewer texts than were asked for.
        """
        copies, order_P = self.settings.num_return_sequences, torch.tensor(of_P, device=self.over_P.device)
        found = Texts.joined([group.finished.of(order_P) for group in self.groups]).best(copies)
        missing = found.scores_PN.isneginf().any(dim=1).nonzero()
        if len(missing):
            row = int(missing[0])
            there = int(found.scores_PN[row].isfinite().sum())
            raise RequestError(
                f"the settings leave row {names[row]} only {there} text(s) and "
                f"num_return_sequences asks for {copies}; ask for fewer, or ban fewer tokens"
            )
        return found


def search(task: Task) -> Texts:
    """The `num_return_sequences` best texts of each prompt, the best first.

    Raises:
        RequestError: the settings leave fewer texts than were asked for.
    """
    rows, settings = task.rows, task.settings
    prompts, beams, device = len(rows.prompt.ids_BT), settings.num_beams, rows.model.device
    max_new_P = torch.full((prompts,), task.max_new, device=device)
    searches = Searches(settings, max_new_P, task.max_new, task.watch)
    n_candidates = candidates(settings)
    u_PN = numbers(settings, prompts, task.max_new * n_candidates, device) if settings.do_sample else None
    log_probs_BV = rows.prefill().log_softmax(dim=-1).repeat_interleave(beams, dim=0)
    rows.spread(beams)
    at, filters = task.history(beams), pipeline(settings)

    def ends(number: int, parents_PK: Tensor, tokens_PK: Tensor) -> Tensor:
        """Where a stop string stands, prompts included."""
        assert task.stops is not None
        rows_PK = torch.arange(prompts, device=device)[:, None] * beams + number * (beams // len(searches.groups))
        before_PKT = at.ids_BT[rows_PK + parents_PK]
        whole_PKT = torch.cat((before_PKT, tokens_PK[..., None]), dim=-1)
        pads_P = at.pads_B[::beams].repeat_interleave(tokens_PK.shape[1])
        return task.stops.ends(whole_PKT.flatten(0, 1), pads_P).view_as(tokens_PK)

    for step in range(task.max_new):
        scores_BV = log_probs_BV
        for change in filters:
            scores_BV = change(scores_BV, at)
        u_PK = None if u_PN is None else u_PN[:, step * n_candidates : (step + 1) * n_candidates]
        rows_B, tokens_B = searches.advance(scores_BV, log_probs_BV, u_PK, None if task.stops is None else ends)
        if bool(searches.over_P.all()):
            break
        rows.swap(rows_B)
        at.reorder(rows_B)
        at.append(tokens_B)
        log_probs_BV = rows.step(tokens_B).log_softmax(dim=-1)
    return searches.best(range(prompts), range(prompts))


def _times(tokens_PX: Tensor, counted_PX: Tensor, like_PNV: Tensor) -> Tensor:
    """How often each token stands among those that count, P × 1 × V."""
    counts_PV = torch.zeros_like(like_PNV[:, 0])
    return counts_PV.scatter_add_(1, tokens_PX, counted_PX.to(counts_PV.dtype))[:, None]
