"""Denoising (BART §2.2, §4.2): restore a text whose spans are hidden and whose sentences are in another order.

*Text infilling.* 30 % of the tokens are removed in spans whose lengths are drawn from a Poisson distribution
(λ = 3), and each span leaves one `[MASK]`, whatever its length: the model must also find out how much is
missing. A span of length 0 puts a `[MASK]` where nothing was. *Sentence permutation.* The sentences of the text
are shuffled first. The labels are the whole text, so every token of it is learnt from, at the price of a
decoder's row as long as the text.

`round(rate · n)` tokens are removed exactly: the last span is cut where it would go beyond. A span of length 0
is left out where the input would become longer than the text; that happens only in very short texts. Text and
labels carry the marks that the tokenizer has (`<s> … </s>`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lathe.errors import RequestError
from lathe.objectives.base import IntArray, Record, Sample, TextObjective, rounded
from lathe.spec import share


@dataclass(frozen=True, kw_only=True)
class Denoising(TextObjective):
    """BART's objective. `rate` of the tokens are hidden in spans of `mean_span`; `permute` shuffles sentences."""

    rate: float = share(0.3)
    mean_span: float = 3.0
    permute: bool = True

    stacks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    name: ClassVar[str] = "denoising"

    def check(self) -> None:
        for token in ("mask", "eos"):
            self.special.need(token, "the objective denoising")
        if self.rate == 0.0 and not self.permute:
            raise RequestError("rate=0 and permute=false: the text would be shown as it is; expected one of the two")
        if self.mean_span <= 0.0:
            raise RequestError(f"mean_span={self.mean_span}: expected more than 0")

    @property
    def reads(self) -> tuple[str, ...]:
        """The text, and where its sentences end if they are shuffled."""
        return ("text", "breaks") if self.permute else ("text",)

    def window(self, length: int) -> int:
        """The row, less the marks."""
        return length - self.special.n_marks

    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """At most the text and its marks, on both sides."""
        return lengths + self.special.n_marks, lengths + self.special.n_marks

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """The damaged text, and the text."""
        text = record["text"]
        shown = shuffled(text, record["breaks"], rng) if self.permute else text
        if self.rate:
            shown = self.infilled(shown, rng)
        return Sample(self.special.framed(shown), self.special.framed(text))

    def infilled(self, text: IntArray, rng: np.random.Generator) -> IntArray:
        """`text` with one `[MASK]` for each span drawn."""
        spans = self.spans(rounded(self.rate, len(text)), rng)
        kept = len(text) - int(spans.sum())
        # Which places of the result are masks: each way to lay them among the kept tokens is equally likely.
        is_mask = np.zeros(kept + len(spans), dtype=bool)
        is_mask[rng.permutation(len(is_mask))[: len(spans)]] = True
        shown = np.full(len(is_mask), self.special.need("mask", "the objective denoising"), dtype=np.int64)
        taken = np.ones(len(is_mask), dtype=np.int64)  # how much of the text each place stands for
        taken[is_mask] = spans
        starts = np.cumsum(taken) - taken
        shown[~is_mask] = text[starts[~is_mask]]
        return shown

    def spans(self, hidden: int, rng: np.random.Generator) -> IntArray:
        """The lengths of the spans, `hidden` together; never more spans than that."""
        lengths: list[int] = []
        left = hidden
        while left:
            lengths.append(min(int(rng.poisson(self.mean_span)), left))
            left -= lengths[-1]
        some = [length for length in lengths if length]
        n_empty = min(len(lengths) - len(some), hidden - len(some))
        return np.array(some + [0] * n_empty, dtype=np.int64)[rng.permutation(len(some) + n_empty)]


def shuffled(text: IntArray, breaks: IntArray, rng: np.random.Generator) -> IntArray:
    """`text` with its sentences, which end at `breaks`, in a drawn order."""
    sentences = np.split(text, breaks[(breaks > 0) & (breaks < len(text))])
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])
