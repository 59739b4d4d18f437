"""Beam search: follow the `num_beams` likeliest unfinished texts at once (Sutskever et al. 2014, §3.2).

At each step every beam is continued with every token, and the best of all continuations are kept. A continuation
that ends goes to the finished texts, under its score: its log-probability over its length to the power
`length_penalty` (Wu et al. 2016, §7, in `transformers`' simpler form); an unfinished one becomes a beam. A row is
over once its finished texts cannot be bettered, which `early_stopping` judges.

With `num_beam_groups` a row has several searches, one after the other in each step; a token costs a group
`diversity_penalty` for each time that the groups before it have just chosen it, and so they part (Vijayakumar et
al. 2018, §4). With `do_sample` the continuations are drawn without replacement, not the best taken.

The order of these steps, and which ties to the length are counted where, follow `transformers`, so that the texts
are the same. Rows of a batch never look at one another.

Shape suffixes: P prompts, N beams of a group, K candidates, T new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.draw import draw_several, numbers
from lathe.generate.filters import pipeline
from lathe.generate.settings import Settings
from lathe.generate.single import Task, refuse_nothing_left
from lathe.generate.stops import StopStrings
from lathe.generate.watch import Continuations


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
    def joined(parts: list[Texts]) -> Texts:
        """The texts of all, prompt by prompt."""
        return Texts(
            torch.cat([each.scores_PN for each in parts], 1),
            torch.cat([each.ids_PNT for each in parts], 1),
            torch.cat([each.log_probs_PNT for each in parts], 1),
            torch.cat([each.lengths_PN for each in parts], 1),
            torch.cat([each.ended_PN for each in parts], 1),
        )


class Group:
    """The beams of one search for each prompt, and its finished texts."""

    def __init__(self, task: Task, number: int, prompts: int, device: torch.device) -> None:
        settings, max_new = task.settings, task.max_new
        self.settings, self.max_new, self.number, self.watch = settings, max_new, number, task.watch
        self.size = settings.num_beams // settings.num_beam_groups
        self.ends = torch.tensor(settings.eos_token_id, dtype=torch.long, device=device)
        self.running = Texts.none(prompts, self.size, max_new, settings.filler, device)
        # All beams start alike, so only the first counts until they differ.
        self.running.scores_PN[:, 0] = 0.0
        self.finished = Texts.none(prompts, self.size, max_new, settings.filler, device)
        self.over_P = torch.zeros(prompts, dtype=torch.bool, device=device)

    def advance(
        self, step: int, scores_PNV: Tensor, log_probs_PNV: Tensor, u_PK: Tensor | None, stops: _Stops | None
    ) -> tuple[Tensor, Tensor]:
        """Continue each beam by a token.

        Args:
            step: how many tokens the beams have.
            scores_PNV: what each token adds to a beam's score; -inf where it may not come.
            log_probs_PNV: the model's own log-probability of each.
            u_PK: the numbers to draw with; None takes the best.
            stops: finds the stop strings.

        Returns:
            Which beam each new beam continues, and its token, P × N both.
        """
        total_PX = (self.running.scores_PN[..., None] + scores_PNV).flatten(1)
        refuse_nothing_left(total_PX.amax(dim=1).masked_fill(self.over_P, 0), step)
        if u_PK is None:
            best_PK, places_PK = total_PX.topk(candidates(self.settings), dim=1)
        else:
            places_PK = draw_several(total_PX, u_PK)
            best_PK = total_PX.gather(1, places_PK)
        n_tokens = scores_PNV.shape[-1]
        parents_PK, tokens_PK = places_PK // n_tokens, places_PK % n_tokens
        found = self.running.take(parents_PK)
        found.scores_PN = best_PK
        found.ids_PNT[..., step] = tokens_PK
        found.log_probs_PNT[..., step] = log_probs_PNV.flatten(1).gather(1, places_PK)
        found.lengths_PN = torch.full_like(tokens_PK, step + 1)
        found.ended_PN = torch.isin(tokens_PK, self.ends)
        if stops is not None:
            found.ended_PN = found.ended_PN | stops.ends(parents_PK, tokens_PK)
        over_P, finished_PK = self.over_P, self._finish(found, found.ended_PN | (step == self.max_new - 1))
        going_on_PK = best_PK.masked_fill(found.ended_PN, -torch.inf)
        chosen_PN = going_on_PK.topk(self.size, dim=1).indices
        if self.watch is not None:
            last_PK, ids_PKT = found.log_probs_PNT[..., step], found.ids_PNT
            self.watch(
                Continuations(step, self.number, ids_PKT, parents_PK, last_PK, best_PK, finished_PK, chosen_PN, over_P)
            )
        found.scores_PN = going_on_PK
        self.running = found.take(chosen_PN)
        self._judge(step + 1)
        return parents_PK.gather(1, chosen_PN), tokens_PK.gather(1, chosen_PN)

    def _finish(self, found: Texts, over_PK: Tensor) -> Tensor:
        """Keep the best of what has ended; of the candidates, only as many count as there are beams. Which counted."""
        scores_PK = found.scores_PN / found.lengths_PN**self.settings.length_penalty
        first_K = torch.arange(scores_PK.shape[1], device=scores_PK.device) < self.size
        counted_PK = over_PK & first_K & ~self.over_P[:, None]
        ended = Texts(
            scores_PK.masked_fill(~counted_PK, -torch.inf),
            found.ids_PNT,
            found.log_probs_PNT,
            found.lengths_PN,
            found.ended_PN,
        )
        self.finished = Texts.joined([self.finished, ended]).best(self.size)
        return counted_PK

    def _judge(self, length: int) -> None:
        """Mark the rows whose finished texts are final, now that the beams have `length` tokens."""
        penalty, early = self.settings.length_penalty, self.settings.early_stopping
        # "never" asks what a beam could still reach. False compares what it has, which is a good guess.
        hoped = self.max_new if early == "never" and penalty > 0 else length
        worst_P = self.finished.scores_PN.amin(dim=1)
        self.over_P = self.over_P | (self.running.scores_PN[:, 0] / hoped**penalty <= worst_P)
        if early is True:
            self.over_P = self.over_P | worst_P.isfinite()


def candidates(settings: Settings) -> int:
    """How many continuations a group looks at in each step: enough that its beams go on if the others all end."""
    return max(2, len(settings.eos_token_id) + 1) * (settings.num_beams // settings.num_beam_groups)


@dataclass(frozen=True)
class _Stops:
    """Stop strings among the continuations of one group's beams."""

    stops: StopStrings
    ids_PNT: Tensor  # the beams, their prompts included
    pads_P: Tensor

    def ends(self, parents_PK: Tensor, tokens_PK: Tensor) -> Tensor:
        prompts, n = parents_PK.shape
        before_PKT = self.ids_PNT.gather(1, parents_PK[..., None].expand(-1, -1, self.ids_PNT.shape[-1]))
        whole_PKT = torch.cat((before_PKT, tokens_PK[..., None]), dim=-1)
        found = self.stops.ends(whole_PKT.flatten(0, 1), self.pads_P.repeat_interleave(n))
        return found.view(prompts, n)


def search(task: Task) -> Texts:
    """The `num_return_sequences` best texts of each prompt, the best first.

    Raises:
        RequestError: the settings leave fewer texts than were asked for.
    """
    rows, settings = task.rows, task.settings
    prompts, n_groups, device = len(rows.prompt.ids_BT), settings.num_beam_groups, rows.model.device
    groups = [Group(task, number, prompts, device) for number in range(n_groups)]
    n_candidates = candidates(settings)
    u_PN = numbers(settings, prompts, task.max_new * n_candidates, device) if settings.do_sample else None
    log_probs_BV = rows.prefill().log_softmax(dim=-1).repeat_interleave(settings.num_beams, dim=0)
    rows.spread(settings.num_beams)
    at, filters = task.history(settings.num_beams), pipeline(settings)
    for step in range(task.max_new):
        scores_BV = log_probs_BV
        for change in filters:
            scores_BV = change(scores_BV, at)
        shape = (prompts, n_groups, settings.num_beams // n_groups, -1)
        scores_PGNV, log_probs_PGNV = scores_BV.view(shape), log_probs_BV.view(shape)
        ids_PGNT, pads_P = at.ids_BT.view(shape), at.pads_B[:: settings.num_beams]
        u_PK = None if u_PN is None else u_PN[:, step * n_candidates : (step + 1) * n_candidates]
        parents: list[Tensor] = []
        chosen: list[Tensor] = []
        for number, group in enumerate(groups):
            scores_PNV = scores_PGNV[:, number]
            if chosen:
                scores_PNV = scores_PNV - settings.diversity_penalty * _times(torch.cat(chosen, 1), scores_PNV)
            stops = None if task.stops is None else _Stops(task.stops, ids_PGNT[:, number], pads_P)
            parents_PN, tokens_PN = group.advance(step, scores_PNV, log_probs_PGNV[:, number], u_PK, stops)
            parents.append(parents_PN + number * group.size)
            chosen.append(tokens_PN)
        if step == task.max_new - 1 or all(bool(group.over_P.all()) for group in groups):
            break
        first_P1 = torch.arange(prompts, device=device)[:, None] * settings.num_beams
        rows_B, tokens_B = (first_P1 + torch.cat(parents, 1)).flatten(), torch.cat(chosen, 1).flatten()
        rows.swap(rows_B)
        at.reorder(rows_B)
        at.append(tokens_B)
        log_probs_BV = rows.step(tokens_B).log_softmax(dim=-1)
    return _given(groups, settings)


def _times(tokens_PX: Tensor, like_PNV: Tensor) -> Tensor:
    """How often each token stands among the ones chosen, P × 1 × V."""
    counts_PV = torch.zeros_like(like_PNV[:, 0])
    return counts_PV.scatter_add_(1, tokens_PX, torch.ones_like(tokens_PX, dtype=counts_PV.dtype))[:, None]


def _given(groups: list[Group], settings: Settings) -> Texts:
    found = Texts.joined([group.finished for group in groups]).best(settings.num_return_sequences)
    missing = found.scores_PN.isneginf().any(dim=1).nonzero()
    if len(missing):
        row = int(missing[0])
        there = int(found.scores_PN[row].isfinite().sum())
        raise RequestError(
            f"the settings leave row {row} only {there} text(s) and num_return_sequences asks for "
            f"{settings.num_return_sequences}; ask for fewer, or ban fewer tokens"
        )
    return found
