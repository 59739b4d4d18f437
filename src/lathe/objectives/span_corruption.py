"""Span corruption (T5 §3.1.4, §3.3.4): drop 15 % of the tokens in spans of mean length 3, and ask for them.

    text     Thank you for inviting me to your party last week
    inputs   Thank you <0> me to your party <1> week </s>
    labels   <0> for inviting <1> last </s>

Each span leaves one sentinel behind, a different one each, and the labels are the sentinels and what they
stand for. Inputs and labels together are little longer than the text, so a decoder that is asked for 15 %
of it costs a fraction of one that is asked for all.

The number of dropped tokens and of spans is fixed by the length, and only the places are drawn: dropped and
kept tokens are each cut into parts at random and laid alternately. A text of 568 tokens therefore always gives
512 inputs and 114 labels. Two details are neither the paper's figure nor its code, which differ: the figure
closes the labels with one more sentinel, which `</s>` makes superfluous; and the code always keeps the first
token and drops the last, which is nothing in a window of 568 tokens but would ask a document of 20 for its
ending every time. Here a span may lie anywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.errors import RequestError
from lathe.objectives.base import IntArray, Record, Sample, TextObjective
from lathe.spec import share


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(TextObjective):
    """T5's objective. `rate` of the tokens are dropped, in spans of `mean_span` tokens on average."""

    rate: float = share(0.15)
    mean_span: float = 3.0

    stacks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    name: ClassVar[str] = "span_corruption"

    def check(self) -> None:
        self.special.need("eos", "the objective span_corruption")
        if not self.special.sentinels:
            raise RequestError(
                "the objective span_corruption needs sentinel tokens and the tokenizer has none; "
                "train it with sentinels, as T5's <extra_id_0> … <extra_id_99>"
            )
        if self.rate == 0.0:
            raise RequestError("rate=0: nothing would be asked; expected more than 0 and below 1")
        if self.mean_span < 1.0:
            raise RequestError(f"mean_span={self.mean_span}: expected 1 or more")

    def dropped(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """How many tokens and how many spans a text of each length loses."""
        return _dropped(lengths, self.rate, self.mean_span)

    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """Kept tokens, sentinels and the end; dropped tokens, sentinels and the end."""
        tokens, spans = self.dropped(lengths)
        return lengths - tokens + spans + 1, tokens + spans + 1

    def window(self, length: int) -> int:
        """The longest text whose inputs fit, which is longer than the row; as many spans as there are sentinels."""
        lengths = np.arange(2, max(2 * length, 4), dtype=np.int64)
        inputs, _ = self.widths(lengths)
        _, spans = self.dropped(lengths)
        fitting = lengths[(inputs <= length) & (spans <= len(self.special.sentinels))]
        if not len(fitting):
            raise RequestError(f"length={length}: expected at least 4 positions for the objective {self.name}")
        return int(fitting[-1])

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """The text without its spans, and the spans."""
        text = record["text"]
        tokens, spans = _dropped_of_one(len(text), self.rate, self.mean_span)
        kept = random_parts(len(text) - tokens + 2, spans + 1, rng)
        kept[[0, -1]] -= 1  # the first and the last kept part may be empty, those between two spans not
        parts = np.empty(2 * spans + 1, dtype=np.int64)
        parts[0::2], parts[1::2] = kept, random_parts(tokens, spans, rng)
        is_dropped = np.repeat(np.arange(len(parts)) % 2 == 1, parts)
        first = np.zeros(len(text), dtype=bool)
        first[parts.cumsum()[0:-1:2]] = True
        sentinels = np.array(self.special.sentinels[:spans], dtype=np.int64)
        inputs = text.copy()
        inputs[first] = sentinels
        inputs = inputs[~is_dropped | first]
        labels = np.insert(text[is_dropped], np.flatnonzero(first[is_dropped]), sentinels)
        eos = self.special.need("eos", "the objective span_corruption")
        return Sample(np.append(inputs, eos), np.append(labels, eos))


def _dropped(lengths: IntArray, rate: float, mean_span: float) -> tuple[IntArray, IntArray]:
    tokens = np.clip(np.round(lengths * rate), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
    spans = np.maximum(np.round(tokens / mean_span), 1).astype(np.int64)
    return tokens, np.minimum(spans, np.maximum(lengths - tokens, 1))


# Keyed by the numbers and not by the objective, whose hash is that of its tokenizer's whole vocabulary.
@functools.lru_cache(maxsize=4096)
def _dropped_of_one(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    tokens, spans = _dropped(np.array([length]), rate, mean_span)
    return int(tokens[0]), int(spans[0])


def random_parts(total: int, parts: int, rng: np.random.Generator) -> IntArray:
    """`total` cut into `parts` whole numbers of 1 or more, every way equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total]))).astype(np.int64)
