"""BART's noise: how much is hidden, how the spans lie, and that the labels are the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.objectives import Denoising, SpecialTokens
from lathe.objectives.denoising import shuffled

SPECIAL = SpecialTokens(vocab_size=100_000, pad=1, bos=0, eos=2, mask=3, decoder_start=2)
OBJECTIVE = Denoising(special=SPECIAL)
INFILLING = Denoising(special=SPECIAL, permute=False)


def test_a_golden_sample():
    record = {"text": np.arange(100, 120), "breaks": np.array([6, 13])}
    sample = OBJECTIVE.sample(record, np.random.Generator(np.random.PCG64([0, 0, 0])))
    assert sample.input_ids.tolist() == GOLDEN
    assert sample.labels.tolist() == [0, *range(100, 120), 2]


@given(length=st.integers(2, 200), seed=st.integers(0, 500), rate=st.sampled_from([0.1, 0.3, 0.9]))
def test_the_hidden_share_is_exact_and_the_rest_keeps_its_order(length: int, seed: int, rate: float):
    objective = Denoising(special=SPECIAL, permute=False, rate=rate)
    text = np.arange(100, 100 + length)
    sample = objective.sample({"text": text}, np.random.default_rng(seed))
    shown = sample.input_ids[1:-1]
    kept = shown[shown != 3]
    assert len(text) - len(kept) == min(max(round(rate * length), 1), length - 1)
    assert (np.diff(kept) > 0).all()
    assert set(kept.tolist()) <= set(text.tolist())
    assert sample.labels.tolist() == [0, *text.tolist(), 2]
    for side, limit in zip((sample.input_ids, sample.labels), objective.widths(np.array([length]))):
        assert len(side) <= limit[0]
    # Each mask stands where its span was, so what is kept between two masks is one stretch of the text.
    stretches = np.split(shown, np.flatnonzero(shown == 3))
    for stretch in stretches:
        assert (np.diff(stretch[stretch != 3]) == 1).all()


def test_span_lengths_are_poisson():
    """BART §2.2: λ = 3; about 5 % of the spans are empty."""
    lengths = INFILLING.spans(60_000, np.random.default_rng(0))
    assert lengths.sum() == 60_000
    assert lengths.mean() == pytest.approx(3.0, abs=0.05)
    assert lengths.var() == pytest.approx(3.0, abs=0.1)
    assert np.mean(lengths == 0) == pytest.approx(np.exp(-3), abs=0.005)


def test_sentences_are_shuffled_and_stay_whole():
    text, orders = np.arange(6), set()
    for seed in range(200):
        orders.add(tuple(shuffled(text, np.array([1, 3, 6]), np.random.default_rng(seed)).tolist()))
    parts = ([0], [1, 2], [3, 4, 5])
    wanted = {
        tuple(x for i in order for x in parts[i])
        for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    }
    assert orders == wanted


def test_only_what_is_needed_is_read():
    assert OBJECTIVE.reads == ("text", "breaks")
    assert INFILLING.reads == ("text",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean_span": 0.0}, "mean_span=0.0: expected more than 0"),
        ({"rate": 0.0, "permute": False}, "shown as it is"),
        ({"special": SpecialTokens(vocab_size=9, eos=1)}, "needs a mask token"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, words: str):
    with pytest.raises(RequestError, match=words):
        Denoising(**{"special": SPECIAL, **changes})


GOLDEN: list[int] = [0, 113, 114, 115, 116, 3, 3, 117, 118, 119, 100, 101, 102, 103, 104, 105, 3, 112, 2]
