"""A deep cut in two stages: half of the way, heal, the rest, heal.

A model that lost more than half of an axis at once is so far from its parent that healing starts from little. Half of
the way (the geometric mean, so that both stages cut the same share) leaves something to heal, and the second cut then
starts from a model that works (Minitron, Muralidharan et al. 2024, §4.4, prunes in steps for the same reason).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families import objections
from lathe.reshape.resize import planned

_MOST_TRIES = 64
_ROUND = 8
_AT_ONCE = ("embedding.vocab_size",)  # tokens that the text does not use are missed by nothing that heals


def half_way(
    source: Architecture, changes: Mapping[str, Any], how: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The changes of the first of two stages: the fields that are cut to less than half, half of the way.

    None where no field is, or where there is no size in between that the family can hold.

    Args:
        how: what `planned` is told besides, such as the method.
    """
    wanted = {path: value for name, value in changes.items() for path in source.paths(name)}
    first = dict(wanted)
    staged = False
    for path, new in wanted.items():
        if path in _AT_ONCE:
            continue
        old: Any = source
        for key in path.split("."):
            old = getattr(old, key)
        if type(old) is not int or type(new) is not int or not 2 * new < old:
            continue
        between = _between(source, first, path, old, new, wanted, dict(how or {}))
        if between is not None:
            first[path], staged = between, True
    return first if staged else None


def _between(
    source: Architecture,
    first: Mapping[str, Any],
    path: str,
    old: int,
    new: int,
    wanted: Mapping[str, Any],
    how: Mapping[str, Any],
) -> int | None:
    """The size nearest to the geometric mean from which the wanted one can be reached."""
    middle = round(math.sqrt(old * new))
    step = _ROUND if middle >= 8 * _ROUND else 1  # a large size is a round one
    nearest = sorted((size for size in range(new + 1, old) if size % step == 0), key=lambda size: abs(size - middle))
    for size in nearest[:_MOST_TRIES]:
        try:
            target, _ = planned(source, {**first, path: size}, **how)
            if objections(target) and not how.get("own_form"):
                continue
            planned(target, wanted, **how)
        except RequestError:
            continue
        return size
    return None
