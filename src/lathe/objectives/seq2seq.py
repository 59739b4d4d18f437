"""Sequence to sequence: a source text and the target that a decoder should write (T5 §2.4; Sutskever et al. 2014).

    encoder   translate English to Korean: Hello </s>
    labels    안녕하세요 </s>

One model learns several tasks when each source begins with words that say which (T5 §2.4). The words are part of
the source text, as they are when the trained model is used, so this objective sees none of it:
`lathe.data.pairs` puts them there and mixes the tasks. Tasks are drawn in proportion to their examples (§3.5.2).

A pair is never cut in pieces. `max_source` and `max_target` shorten what is longer, from the end, and count the
marks; without them nothing is shortened, and a pair too long for a row is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.errors import RequestError
from lathe.objectives.base import IntArray, Record, RecordObjective, Sample
from lathe.spec import size


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(RecordObjective):
    """Target from source, shortened to `max_source` and `max_target` positions where these are given."""

    max_source: int | None = size(2**20, least=4, default=None)
    max_target: int | None = size(2**20, least=4, default=None)

    stacks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    name: ClassVar[str] = "seq2seq"

    def check(self) -> None:
        self.special.need("eos", "the objective seq2seq")

    @property
    def reads(self) -> tuple[str, ...]:
        """Both texts."""
        return ("source", "target")

    def record_widths(self, lengths: Mapping[str, IntArray]) -> tuple[IntArray, IntArray]:
        """Source and target with their marks, after shortening."""
        source, target = (lengths[name] + self.special.n_marks for name in self.reads)
        if not lengths["source"].all():
            number = int(np.flatnonzero(lengths["source"] == 0)[0])
            raise RequestError(f"record {number + 1}: the source is empty; leave such pairs out")
        return (
            np.minimum(source, self.max_source or np.iinfo(np.int64).max),
            np.minimum(target, self.max_target or np.iinfo(np.int64).max),
        )

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """Nothing is drawn: a pair asks itself."""
        return Sample(self._framed(record["source"], self.max_source), self._framed(record["target"], self.max_target))

    def _framed(self, text: IntArray, most: int | None) -> IntArray:
        return self.special.framed(text if most is None else text[: most - self.special.n_marks])
