"""Byte-pair merges in plain Python: how one piece comes about, one merge after the other.

A BPE model joins, again and again, the neighbouring pair whose merge stands first in its list, the leftmost of
equal ones (Sennrich et al. 2016, section 3.2). No merge crosses the borders of a piece that is there in the end, or
the borders would be inside it. So whatever stands around it, a piece comes about by the same merges as from its
characters alone, and those are the ones that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from lathe.text.rewritten import merge_pairs, model_ids

Ranks = Mapping[tuple[str, str], int]


def spell(symbols: Sequence[str], ranks: Ranks) -> Iterator[list[str]]:
    """The symbols as they are and after each merge, the last as the model leaves them."""
    current = list(symbols)
    yield list(current)
    while True:
        best = min(
            ((ranks[pair], at) for at, pair in enumerate(pairwise(current)) if pair in ranks),
            default=None,
        )
        if best is None:
            return
        at = best[1]
        current[at : at + 2] = [current[at] + current[at + 1]]
        yield list(current)


class Parts:
    """Which tokens a BPE model needs to make a token: its characters, and what they are merged to on the way."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.ids = model_ids(model)
        self.ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}
        # A mark at the start or the end of words makes a symbol more than its characters.
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._is_marked = bool(self._prefix or model.get("end_of_word_suffix"))
        self._made_by: dict[str, list[tuple[str, str]]] = {}
        for left, right in self.ranks:
            self._made_by.setdefault(self.joined(left, right), []).append((left, right))
        self.of = cache(self._of)

    def joined(self, left: str, right: str) -> str:
        """The token that a merge makes."""
        return left + right.removeprefix(self._prefix)

    def _of(self, token: str) -> frozenset[int]:
        """The ids that `token` needs beside its own."""
        if token not in self._made_by:
            return frozenset()
        if not self._is_marked:
            seen: set[str] = set()
            current: list[str] = []
            for current in spell(token, self.ranks):
                seen.update(current)
            if current == [token] and seen <= self.ids.keys():
                return frozenset(self.ids[each] for each in seen if each != token)
        # It does not come about from its characters (it may from bytes), so everything that it could be made of.
        found: set[int] = set()
        waiting, known = [token], {token}
        while waiting:
            for pair in self._made_by.get(waiting.pop(), []):
                for part in pair:
                    if part in self.ids and part not in known:
                        known.add(part)
                        waiting.append(part)
                        found.add(self.ids[part])
        return frozenset(found)
