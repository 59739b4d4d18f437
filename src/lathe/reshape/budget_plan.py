"""The sizes that a budget is spent on, and what was measured to find them: what `lathe.reshape.budget` answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One axis of a plan.

    Args:
        saved: by this cut after those above it, in the budget's unit.
        loss: of the model with this cut alone; None where it was not measured.
        is_measured: whether at this size; else it lies between sizes that were.
        why: in a few words.
    """

    label: str
    field: str
    old: int
    new: int
    saved: float
    loss: float | None
    is_measured: bool
    why: str


@dataclass(frozen=True)
class Alone:
    """One axis that meets the budget by itself."""

    label: str
    field: str
    size: int
    cost: float
    loss: float


@dataclass(frozen=True)
class BudgetPlan:
    """The sizes that a budget is spent on, and how they were found.

    Args:
        changes: the sizes, as `Architecture.with_` takes them.
        written: the same as they are typed, under short names where these set nothing else.
        limit, before, after: the budget, and what the model takes, in `unit`.
        loss_before, loss: on held-out text, nats a token of the source's tokenizer.
        rows: every axis that could be cut.
        alone: the axes that meet the budget by themselves.
        without: the axes that cannot be cut, and why.
        trials: every trial: its sizes, what it takes, and its loss.
        measured_on: which text.
        timed: what was timed and where; empty where nothing was.
        given: the sizes that were set in any case, as they are typed; `before` and `loss_before` are with them.
    """

    unit: str
    limit: float
    before: float
    after: float
    loss_before: float
    loss: float
    changes: dict[str, Any]
    written: str
    rows: tuple[Row, ...]
    alone: tuple[Alone, ...]
    without: dict[str, str]
    trials: tuple[dict[str, Any], ...]
    measured_on: str
    timed: str
    given: str = ""

    @property
    def best_alone(self) -> Alone | None:
        """The single axis that meets the budget at the lowest loss; None where none does."""
        return min(self.alone, key=lambda each: each.loss, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BudgetPlan:
        """The plan of `to_dict`, which may have been JSON meanwhile.

        Raises:
            TypeError: other fields than a plan has.
        """
        parts = {
            "rows": tuple(Row(**each) for each in values["rows"]),
            "alone": tuple(Alone(**each) for each in values["alone"]),
            "trials": tuple(values["trials"]),
        }
        return cls(**{**values, **parts})

    def __str__(self) -> str:
        """The plan as a table and sentences."""
        from lathe.reshape.budget_table import text

        return text(self.to_dict())
