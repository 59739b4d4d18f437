"""Objectives by name, with their own defaults."""

from __future__ import annotations

from lathe.errors import RequestError
from lathe.objectives.base import Objective, SpecialTokens
from lathe.objectives.causal import Causal
from lathe.objectives.masked import Masked
from lathe.objectives.span_corruption import SpanCorruption
from lathe.spec import unknown

_OBJECTIVES: dict[str, type[Objective]] = {each.name: each for each in (SpanCorruption, Causal, Masked)}


def objective_named(name: str, special: SpecialTokens) -> Objective:
    """The objective of that name; an unknown one is a `RequestError`."""
    if name not in _OBJECTIVES:
        raise RequestError(unknown("objective", name, _OBJECTIVES))
    return _OBJECTIVES[name](special=special)
