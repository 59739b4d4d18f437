"""A 5-gram model with modified Kneser-Ney smoothing (Chen & Goodman 1998 §3), in bits per byte: what a language model
has to beat.

    python results/ngram.py --tokenizer tok-mixed --train reviews.txt.gz --train peps.jsonl.gz --valid held-out.jsonl.gz

It reads the same tokens as the model beside it, and predicts the same ones: all of a document, and its end. A document
begins with a mark that is never predicted. Every n-gram is counted; none is left out for being rare.

    p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h·)  +  γ(h) · p(w | h without its first token)

with the count c of an n-gram below the highest order being how many different tokens stand before it, three discounts
an order from the counts of counts, and γ(h) what the discounts took. Below the single tokens lies 1 / V.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lathe.data import read
from lathe.errors import RequestError
from lathe.text import Tokenizer

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class Level:
    """The n-grams of one order: each is the number of its first n - 1 tokens, one order below, by V, plus its last."""

    keys_N: Ints  # sorted
    counts_N: Ints
    discounts: Floats  # for a count of 1, 2, 3 and more; at 0 stands 0
    totals_P: Ints  # for each beginning: the sum of the counts
    left_P: Floats  # for each beginning: the mass that the discounts took

    def find(self, prefixes: Ints, tokens: Ints, vocabulary: int) -> Ints:
        """The numbers of n-grams; -1 where there is none."""
        keys = prefixes * vocabulary + tokens
        places = np.minimum(np.searchsorted(self.keys_N, keys), len(self.keys_N) - 1)
        return np.where((prefixes >= 0) & (self.keys_N[places] == keys), places, -1)

    def interpolate(self, lower: Floats, prefixes: Ints, found: Ints) -> Floats:
        """The chances of this order from those of the one below; the same where the beginning was never seen."""
        counts = np.where(found >= 0, self.counts_N[found], 0)
        kept = counts - self.discounts[np.minimum(counts, 3)]
        known = (prefixes >= 0) & (self.totals_P[prefixes] > 0)
        total = np.where(known, self.totals_P[prefixes], 1)
        return np.where(known, kept / total + self.left_P[prefixes] / total * lower, lower)


class KneserNey:
    """`order`-grams over documents of token ids; `boundary` is an id that no document holds."""

    def __init__(self, documents: list[list[int]], vocabulary: int, order: int) -> None:
        self.order, self.boundary, self.vocabulary = order, vocabulary, vocabulary + 1
        tokens_T, depth_T = self._laid_out(documents)
        # ends[n][t]: the number of the n-gram that ends at t; -1 where it would begin in the document before.
        ends = [np.zeros_like(tokens_T)]
        keys = []
        for n in range(1, order + 1):
            previous = ends[-1] if n == 1 else np.concatenate([[-1], ends[-1][:-1]])
            valid = (depth_T >= n - 1) & (previous >= 0)
            unique, numbers = np.unique(previous[valid] * self.vocabulary + tokens_T[valid], return_inverse=True)
            number_T = np.full_like(tokens_T, -1)
            number_T[valid] = numbers
            keys.append(unique)
            ends.append(number_T)
        self.levels = [self._level(n, keys, ends, tokens_T, depth_T) for n in range(1, order + 1)]

    def _laid_out(self, documents: list[list[int]]) -> tuple[Ints, Ints]:
        """The tokens one after another, each document behind its mark, and how deep in its document each stands."""
        rows = [np.array([self.boundary, *document], dtype=np.int64) for document in documents]
        return np.concatenate(rows), np.concatenate([np.arange(len(row), dtype=np.int64) for row in rows])

    def _level(self, n: int, keys: list[Ints], ends: list[Ints], tokens_T: Ints, depth_T: Ints) -> Level:
        size, number_T = len(keys[n - 1]), ends[n]
        counts = np.bincount(number_T[number_T >= 0], minlength=size)
        if n < self.order:
            # How many different tokens stand before it; an n-gram that begins with the mark keeps its count.
            longer, first = np.unique(ends[n + 1], return_index=True)
            behind = np.bincount(number_T[first[longer >= 0]], minlength=size)
            starts = np.zeros(size, dtype=bool)
            starts[number_T[(depth_T == n - 1) & (number_T >= 0)]] = True
            counts = np.where(starts, counts, behind)
        prefixes, last = np.divmod(keys[n - 1], self.vocabulary)
        counts = np.where(last == self.boundary, 0, counts)  # the mark is never predicted
        discounts = _discounts(counts)
        n_prefixes = 1 if n == 1 else len(keys[n - 2])
        totals = np.bincount(prefixes, weights=counts, minlength=n_prefixes).astype(np.int64)
        left = np.bincount(prefixes, weights=discounts[np.minimum(counts, 3)], minlength=n_prefixes).astype(np.float64)
        return Level(keys[n - 1], counts, discounts, totals, left)

    def log2(self, documents: list[list[int]]) -> Floats:
        """The base-2 logarithm of each token's probability."""
        tokens_T, depth_T = self._laid_out(documents)
        chance = np.full(len(tokens_T), 1 / (self.vocabulary - 1))
        numbers = np.zeros_like(tokens_T)
        for n, level in enumerate(self.levels, start=1):
            prefixes = numbers if n == 1 else np.concatenate([[-1], numbers[:-1]])
            prefixes = np.where(depth_T >= n - 1, prefixes, -1)
            numbers = level.find(prefixes, tokens_T, self.vocabulary)
            chance = level.interpolate(chance, prefixes, numbers)
        asked: Floats = np.log2(chance[depth_T > 0])
        return asked

    def total(self, history: list[int]) -> float:
        """The sum of the chances of all tokens after a history: 1."""
        return float(sum(2 ** self.log2([[*history, token]])[-1] for token in range(self.boundary)))


def _discounts(counts: Ints) -> Floats:
    """Chen & Goodman's estimates; a half, one and one and a half where there is too little text for them."""
    of = [int((counts == k).sum()) for k in (1, 2, 3, 4)]
    if not all(of[:3]):
        return np.array([0.0, 0.5, 1.0, 1.5])
    base = of[0] / (of[0] + 2 * of[1])
    found = [k - (k + 1) * base * of[k] / of[k - 1] for k in (1, 2, 3)]
    return np.array([0.0, *(min(max(each, 0.0), k) for k, each in enumerate(found, start=1))])


def main() -> None:
    """Train, evaluate, print one JSON line for each file."""
    words = argparse.ArgumentParser(description="Bits per byte of a Kneser-Ney model.")
    words.add_argument("--tokenizer", required=True)
    words.add_argument("--train", action="append", required=True)
    words.add_argument("--valid", action="append", required=True, metavar="FILE[:COLUMN]")
    words.add_argument("--order", type=int, default=5)
    given = words.parse_args()
    tokenizer = Tokenizer.load(Path(given.tokenizer))
    model = KneserNey(documents(tokenizer, given.train)[0], tokenizer.vocab_size, given.order)
    for named in given.valid:
        held_out, n_bytes = documents(tokenizer, [named])
        bits = -model.log2(held_out)
        sums = [model.total(document[: model.order]) for document in held_out[:3]]
        print(
            json.dumps(
                {
                    "file": Path(named).name,
                    "order": model.order,
                    "ngrams": [len(level.keys_N) for level in model.levels],
                    "tokens": len(bits),
                    "bytes": n_bytes,
                    "perplexity": 2 ** float(bits.mean()),
                    "bits_per_byte": float(bits.sum()) / n_bytes,
                    "largest_distance_of_a_sum_from_1": max(abs(each - 1) for each in sums),
                }
            )
        )
        assert all(math.isclose(each, 1, rel_tol=1e-9) for each in sums)


def documents(tokenizer: Tokenizer, files: list[str]) -> tuple[list[list[int]], int]:
    """The tokens of each record with the mark of its end, and how many bytes the records have."""
    eos = tokenizer.eos_id
    if eos is None:
        raise RequestError("the tokenizer has no end token, and each record is closed with it; give another tokenizer")
    found, n_bytes = [], 0
    for named in files:
        file, _, column = named.partition(":")
        texts = [record["text"] for record in read(file, fields={"text": column or "text"})]
        n_bytes += sum(len(text.encode()) for text in texts)
        found += [[*ids, eos] for ids in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return found, n_bytes


if __name__ == "__main__":
    main()
