"""What the loops tell somebody who watches them: every step's candidates, before anything of it is thrown away.

Shape suffixes: B rows, P prompts, N beams of a group, K candidates, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """One token a row was chosen.

    Args:
        step: how many tokens the rows had.
        logits_BV: the model's.
        stages: each filter's name and the logits it left, in order.
        u_B: the numbers drawn with; None where the likeliest was taken.
        chosen_B: the tokens.
        over_B: which rows had ended before.
    """

    step: int
    logits_BV: Tensor
    stages: list[tuple[str, Tensor]]
    u_B: Tensor | None
    chosen_B: Tensor
    over_B: Tensor


@dataclass(frozen=True)
class Continuations:
    """The beams of one group were continued, and the best continuations looked at.

    Args:
        step: how many tokens the beams had.
        group: the group's number.
        ids_PKT: the continuations' tokens, of which `step` + 1 count.
        parents_PK: which beam each continues.
        log_probs_PK: of its last token under the model, before any filter.
        scores_PK: of the whole.
        finished_PK: which became finished texts.
        kept_PN: which go on as beams.
        over_P: which prompts were done before.
    """

    step: int
    group: int
    ids_PKT: Tensor
    parents_PK: Tensor
    log_probs_PK: Tensor
    scores_PK: Tensor
    finished_PK: Tensor
    kept_PN: Tensor
    over_P: Tensor


Watch: TypeAlias = Callable[[Choice | Continuations], None]
