"""What an architecture costs, before and after a change, and what else must follow from the change.

    lathe.plan("t5-large", d_model=512).after.parameters.total

It is arithmetic over the blueprint: no torch, no weights, milliseconds for the largest models. Parameters
and matrix operations are exact; memory is a model of what PyTorch keeps, held against measured peaks in
docs/planning.md. (The package is not called `plan` because `lathe.plan` is the function.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.planner.consequences import Consequence, consequences, proposal
from lathe.planner.corpus import CorpusAdvice, corpus_advice
from lathe.planner.costs import STEP, Costs, costs
from lathe.planner.memory import OPTIMIZERS
from lathe.planner.quantities import parse_count
from lathe.planner.text import render, summary
from lathe.presets import preset
from lathe.spec import Spec

DEFAULT_BATCH, DEFAULT_LENGTH = 8, 512
MAX_BATCH, MAX_LENGTH = 2**20, 2**24


@dataclass(frozen=True)
class Timing:
    """How long things take at an assumed speed, matrix operations alone.

    Attributes:
        flops_per_second: the speed that was assumed.
        prefill: seconds until the first token of one row.
        decode: seconds for one more token; None for an encoder alone.
        training_step: seconds for one step of the batch.
        epoch: seconds for one pass over the corpus; None where no corpus was given.
    """

    flops_per_second: int
    prefill: float
    decode: float | None
    training_step: float
    epoch: float | None


@dataclass(frozen=True)
class Plan:
    """An architecture, what it would become, and what that means.

    Attributes:
        before, after: the costs of both; equal where nothing was changed.
        changes: the fields that were set.
        consequences: what else follows, in sentences.
        proposal: the fields that would answer all consequences that can be answered.
        optimizer: whose memory is counted.
        corpus: whether there is enough text; None where no corpus was given.
        timing_before, timing_after: at an assumed speed; None where none was given.
    """

    before: Costs
    after: Costs
    changes: dict[str, Any]
    consequences: list[Consequence]
    proposal: dict[str, Any]
    optimizer: str = "adamw"
    corpus: CorpusAdvice | None = None
    timing_before: Timing | None = None
    timing_after: Timing | None = None

    def __str__(self) -> str:
        """The plan as a table and sentences of 80 columns."""
        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        before, after = self.before.to_dict(), self.after.to_dict()
        if self.timing_before is not None and self.timing_after is not None:
            before["seconds"], after["seconds"] = asdict(self.timing_before), asdict(self.timing_after)
        return {
            "changes": {name: _plain(value) for name, value in self.changes.items()},
            "before": before,
            "after": after,
            "consequences": [
                {"about": each.about, "text": each.text, "changes": dict(each.changes)} for each in self.consequences
            ],
            "proposal": self.proposal,
            "summary": summary(self),
            "optimizer": self.optimizer,
            "corpus": None if self.corpus is None else asdict(self.corpus),
        }


def plan(
    model: Architecture | str,
    changes: Mapping[str, Any] | None = None,
    /,
    *,
    tokens: int | str | None = None,
    batch: int = DEFAULT_BATCH,
    length: int | None = None,
    optimizer: str = "adamw",
    flops_per_second: float | str | None = None,
    head: str | None = None,
    **more: Any,
) -> Plan:
    """What a model costs, and what it would cost with other sizes.

    Args:
        model: an architecture, or a preset's name.
        changes: dotted paths to values, as `{"encoder.n_layers": 4}`.
        tokens: how large the training corpus is, as 40_000_000 or "40M".
        batch, length: the rows and tokens for which memory and operations are given; 8 rows of 512 tokens, or of
            as many as the model has positions for.
        optimizer: adamw, momentum or sgd.
        flops_per_second: a speed that was measured or is assumed, as "100G"; gives times.
        head: which head of a preset is meant, as "masked" for BERT.
        more: bare names, as `d_model=512`; see `Architecture.with_`.

    Raises:
        RequestError: an unknown preset, head or field, or a value that cannot be.

    >>> import lathe
    >>> cut = lathe.plan("t5-large", d_model=512)
    >>> cut.before.parameters.total, cut.after.parameters.total
    (737668096, 368834560)
    >>> cut.proposal
    {'n_heads': 8, 'd_ff': 2048}
    """
    if isinstance(model, Architecture) and head is not None:
        raise RequestError(f"head={head!r}: only a preset has heads to choose from; give the architecture its head")
    start = preset(model, head) if isinstance(model, str) else model
    given = {**(changes or {}), **more}
    goal = start.with_(given) if given else start
    length = _length(length, batch, start, goal)
    corpus_size = None if tokens is None else parse_count(tokens, "tokens")
    before = costs(start, batch, length, optimizer)
    after = costs(goal, batch, length, optimizer) if given else before
    found = consequences(before, after, given)
    advice = None if corpus_size is None else corpus_advice(after.parameters.total, corpus_size)
    speed = None if flops_per_second is None else parse_count(flops_per_second, "flops_per_second")
    return Plan(
        before=before,
        after=after,
        changes=given,
        consequences=found,
        proposal=proposal(found),
        optimizer=optimizer,
        corpus=advice,
        timing_before=_timing(before, speed, corpus_size),
        timing_after=_timing(after, speed, corpus_size),
    )


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Spec) else value


def _length(length: int | None, batch: int, *architectures: Architecture) -> int:
    """The length to plan for, checked against the positions that both architectures have."""
    limits = [stack.positions.limit for each in architectures for _, stack in each.stacks]
    limit = min((each for each in limits if each is not None), default=MAX_LENGTH)
    for name, value, most in (("batch", batch, MAX_BATCH), ("length", length, limit)):
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise RequestError(f"{name}={value!r}: expected a whole number from 1 to {most:,}")
    return min(DEFAULT_LENGTH, limit) if length is None else length


def _timing(of: Costs, speed: int | None, tokens: int | None) -> Timing | None:
    if speed is None:
        return None
    return Timing(
        flops_per_second=speed,
        prefill=of.prefill.total / speed,
        decode=None if of.decode is None else of.decode.total / speed,
        training_step=STEP * of.batch * of.forward.total / speed,
        epoch=None if tokens is None else STEP * of.forward.per_token * tokens / speed,
    )


__all__ = ["OPTIMIZERS", "Consequence", "CorpusAdvice", "Costs", "Plan", "Timing", "plan"]
