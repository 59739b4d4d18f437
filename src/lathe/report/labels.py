"""Names in pictures: as they are written, told apart, and no longer than a legend has room for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def as_written(name: str) -> str:
    """A name as a label's text.

    Matplotlib leaves a label out of the legend that begins with `_`, and sets what stands between two `$` as
    mathematics, or fails to.
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def told_apart(places: Sequence[PurePath]) -> list[str]:
    """The last parts of some paths, as few as tell them apart; the paths themselves where nothing does."""
    for length in range(1, max((len(place.parts) for place in places), default=0) + 1):
        names = [str(PurePath(*place.parts[-length:])) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def short(names: Sequence[str], most: int) -> list[str]:
    """Names of at most so many characters: the middle of a long one goes, and of each as little as tells them apart.

    >>> short(["a" * 20 + "1", "a" * 20 + "2"], 8)
    ['aaa…aaa1', 'aaa…aaa2']
    """
    tail = most // 2
    while True:
        head = max(most - 1 - tail, 0)
        found = [name if len(name) <= most else f"{name[:head]}…{name[len(name) - tail :]}" for name in names]
        if len(set(found)) == len(set(names)) or tail >= max(map(len, names)):
            return found
        tail += 1
        most = max(most, tail + 1)
