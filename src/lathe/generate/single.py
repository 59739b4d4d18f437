"""One token a row and step: the likeliest, or a draw.

`tokens` is the loop. It yields each step's tokens as they are chosen, so what streams text to a reader and what
returns it whole run the same code.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.draw import draw, numbers
from lathe.generate.filters import Filter, pipeline
from lathe.generate.history import History
from lathe.generate.prompt import Prompt
from lathe.generate.rows import Rows
from lathe.generate.settings import Settings
from lathe.generate.stops import StopStrings
from lathe.generate.watch import Choice, Watch


@dataclass(frozen=True)
class Task:
    """What is to be decoded.

    Args:
        rows: the batch, unread.
        settings: how.
        columns: of the prompt as the caller gave it.
        max_new: tokens to add at most.
        source: what the encoder read, where there is one.
        stops: texts that end a row.
        watch: told of each step, where somebody wants to see it.
    """

    rows: Rows
    settings: Settings
    columns: int
    max_new: int
    source: Prompt | None = None
    stops: StopStrings | None = None
    watch: Watch | None = None

    def history(self, copies: int) -> History:
        """Of `copies` rows for each prompt."""
        return History.of(self.rows.prompt, self.columns, self.max_new, self.source, copies)


@dataclass(frozen=True)
class Step:
    """One step's tokens.

    Args:
        tokens_B: the padding token where the row had ended before.
        log_probs_B: of each under the model, before any filter; 0 where the row had ended before.
        ended_B: whether the row has ended, with this token or before.
    """

    tokens_B: Tensor
    log_probs_B: Tensor
    ended_B: Tensor


def tokens(task: Task) -> Iterator[Step]:
    """Each step's tokens, a row for every sample of every prompt, until all have ended or `max_new` are there."""
    rows, settings = task.rows, task.settings
    n_prompts, copies = len(rows.prompt.ids_BT), settings.num_return_sequences
    device = rows.model.device
    u_BN = numbers(settings, n_prompts, task.max_new, device, copies=copies) if settings.do_sample else None
    filters = pipeline(settings)
    ends = torch.tensor(settings.eos_token_id, dtype=torch.long, device=device)
    if u_BN is None and not filters and task.watch is None:
        yield from _likeliest(task, ends)
        return
    at = task.history(copies)
    ended_B = torch.zeros(n_prompts * copies, dtype=torch.bool, device=device)
    chosen_B: Tensor | None = None  # before the first step there is the prompt to read
    for step in range(task.max_new):
        read_BV = rows.prefill() if chosen_B is None else rows.step(chosen_B)
        logits_BV = _copied(read_BV, copies) if chosen_B is None else read_BV
        chosen_B = _choose(task, filters, at, step, logits_BV, None if u_BN is None else u_BN[:, step], ended_B)
        log_probs_B = logits_BV.log_softmax(dim=-1).gather(1, chosen_B[:, None])[:, 0]
        if step == 0:
            rows.spread(copies)
        chosen_B = chosen_B.masked_fill(ended_B, settings.filler)
        log_probs_B = log_probs_B.masked_fill(ended_B, 0)
        at.append(chosen_B)
        ended_B = ended_B | torch.isin(chosen_B, ends)
        if task.stops is not None:
            ended_B = ended_B | task.stops.ends(at.ids_BT, at.pads_B)
        yield Step(chosen_B, log_probs_B, ended_B)
        if step == task.max_new - 1 or bool(ended_B.all()):
            return


def _likeliest(task: Task, ends: Tensor) -> Iterator[Step]:
    """`tokens` where nothing stands between the logits and the choice: what reads the tokens chooses as well.

    It may take several steps at a time, but for texts that end a row, which are looked for after each.
    """
    rows, stops, filler = task.rows, task.stops, task.settings.filler
    at = task.history(task.settings.num_return_sequences)
    tokens_B, log_probs_B = (_copied(each, task.settings.num_return_sequences) for each in rows.likeliest())
    rows.spread(task.settings.num_return_sequences)
    taken = tokens_B[None], log_probs_B[None], torch.isin(tokens_B, ends)[None]
    left = task.max_new
    while True:
        for tokens_B, log_probs_B, ended_B in zip(*taken):
            if stops is not None:
                at.append(tokens_B)
                ended_B = ended_B | stops.ends(at.ids_BT, at.pads_B)
            yield Step(tokens_B, log_probs_B, ended_B)
        left -= len(taken[0])
        if left == 0 or bool(ended_B.all()):
            return
        taken = rows.go_on(tokens_B, ended_B, most=left if stops is None else 1, ends=ends, filler=filler)


def _copied(found: Tensor, copies: int) -> Tensor:
    """What was found of each prompt, for each of its rows."""
    return found.repeat_interleave(copies, dim=0) if copies > 1 else found


def _choose(
    task: Task,
    filters: list[Filter],
    at: History,
    step: int,
    logits_BV: Tensor,
    u_B: Tensor | None,
    ended_B: Tensor,
) -> Tensor:
    """A token of each row from what the filters leave, the likeliest or drawn with `u_B`."""
    left_BV, stages = logits_BV, []
    for change in filters:
        left_BV = change(left_BV, at)
        if task.watch is not None:
            stages.append((change.name, left_BV))
    if filters:
        refuse_nothing_left(left_BV.amax(dim=-1).masked_fill(ended_B, 0), step)
    chosen_B = left_BV.argmax(dim=-1) if u_B is None else draw(left_BV, u_B)
    if task.watch is not None:
        task.watch(Choice(step, logits_BV, stages, u_B, chosen_B, ended_B))
    return chosen_B


def refuse_nothing_left(best_B: Tensor, step: int | Tensor, names: Sequence[int] | None = None) -> None:
    """Raise RequestError where the best token of a row is none at all: the filters have ruled out every one.

    Args:
        step: how many new tokens the rows have; one number for all or one for each.
        names: what the rows are called; their places where left out.
    """
    none_B = best_B.isneginf()
    if bool(none_B.any()):
        row = int(none_B.nonzero()[0])
        count = step if isinstance(step, int) else int(step[row])
        raise RequestError(
            f"the settings leave row {row if names is None else names[row]} no token to choose as new token "
            f"{count + 1}; ban fewer tokens or n-grams, or ask for fewer new tokens"
        )
