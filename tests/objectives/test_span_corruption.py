"""Span corruption against T5's own figures and against a reading of its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.objectives import SpanCorruption, SpecialTokens
from lathe.objectives.span_corruption import random_parts

SENTINELS = tuple(range(999, 899, -1))
SPECIAL = SpecialTokens(vocab_size=1000, pad=0, eos=1, sentinels=SENTINELS, decoder_start=0)
OBJECTIVE = SpanCorruption(special=SPECIAL)


def restored(inputs: list[int], labels: list[int]) -> list[int]:
    """The text that inputs and labels were made from: each sentinel replaced by what it stands for."""
    spans: dict[int, list[int]] = {}
    for token in labels[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    text: list[int] = []
    for token in inputs[:-1]:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


def test_the_papers_lengths():
    """T5 §3.1.4: 568 tokens give 512 inputs and 114 labels, both with the end token."""
    assert OBJECTIVE.window(512) == 568
    sample = OBJECTIVE.sample({"text": np.arange(100, 668)}, np.random.default_rng(0))
    assert (len(sample.input_ids), len(sample.labels)) == (512, 114)


def test_the_papers_example(monkeypatch: pytest.MonkeyPatch):
    """T5 figure 2: kept parts of 2, 4 and 1 words around dropped parts of 2 and 1."""
    thank, you, for_, inviting, me, to, your, party, last, week = range(100, 110)
    parts = iter([[3, 4, 2], [2, 1]])  # the outer kept parts are drawn one longer
    monkeypatch.setattr(
        "lathe.objectives.span_corruption.random_parts", lambda total, count, rng: np.array(next(parts))
    )
    objective = SpanCorruption(special=SPECIAL, rate=0.3, mean_span=1.5)
    text = np.array([thank, you, for_, inviting, me, to, your, party, last, week])
    sample = objective.sample({"text": text}, np.random.default_rng(0))
    assert sample.input_ids.tolist() == [thank, you, 999, me, to, your, party, 998, week, 1]
    assert sample.labels.tolist() == [999, for_, inviting, 998, last, 1]


def test_a_golden_sample():
    sample = OBJECTIVE.sample({"text": np.arange(100, 140)}, np.random.Generator(np.random.PCG64([0, 0, 0])))
    inputs, labels = sample.input_ids.tolist(), sample.labels.tolist()
    assert (inputs, labels) == GOLDEN


GOLDEN = (
    [
        100,
        101,
        102,
        103,
        999,
        105,
        106,
        107,
        108,
        109,
        110,
        111,
        112,
        113,
        114,
        115,
        116,
        117,
        118,
        119,
        120,
        121,
        122,
        123,
        124,
        125,
        126,
        127,
        128,
        129,
        130,
        131,
        132,
        133,
        998,
        139,
        1,
    ],
    [999, 104, 998, 134, 135, 136, 137, 138, 1],
)


@given(
    length=st.integers(2, 300),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    mean=st.sampled_from([1.0, 3.0, 10.0]),
)
def test_nothing_is_lost_and_the_lengths_are_those_promised(length: int, seed: int, rate: float, mean: float):
    special = SpecialTokens(vocab_size=2000, eos=1, sentinels=tuple(range(1999, 1000, -1)))
    objective = SpanCorruption(special=special, rate=rate, mean_span=mean)
    text = np.arange(2, 2 + length)
    sample = objective.sample({"text": text}, np.random.default_rng(seed))
    inputs, labels = objective.widths(np.array([length]))
    assert (len(sample.input_ids), len(sample.labels)) == (int(inputs[0]), int(labels[0]))
    assert sample.input_ids[-1] == sample.labels[-1] == 1
    dropped, spans = (int(n[0]) for n in objective.dropped(np.array([length])))
    used = [token for token in sample.input_ids.tolist() if token > 1000]
    assert used == list(special.sentinels[:spans])
    assert [token for token in sample.labels.tolist() if token > 1000] == used
    assert len(sample.labels) == dropped + spans + 1
    kept = [token for token in (*sample.input_ids, *sample.labels) if 1 < token <= 1000]
    assert sorted(kept) == text.tolist()


@given(length=st.integers(2, 200), seed=st.integers(0, 100))
def test_the_labels_put_back_give_the_text(length: int, seed: int):
    text = np.arange(100, 100 + length)
    sample = OBJECTIVE.sample({"text": text}, np.random.default_rng(seed))
    assert restored(sample.input_ids.tolist(), sample.labels.tolist()) == text.tolist()


@given(length=st.integers(4, 700))
def test_a_window_is_the_longest_text_that_fits(length: int):
    window = OBJECTIVE.window(length)
    inputs, _ = OBJECTIVE.widths(np.array([window, window + 1]))
    _, spans = OBJECTIVE.dropped(np.array([window, window + 1]))
    assert inputs[0] <= length
    assert inputs[1] > length or spans[1] > len(SENTINELS)


def test_random_parts_reach_every_cut_equally():
    rng = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        parts = tuple(random_parts(5, 2, rng).tolist())
        counts[parts] = counts.get(parts, 0) + 1
    assert set(counts) == {(1, 4), (2, 3), (3, 2), (4, 1)}
    assert min(counts.values()) > 650  # 750 expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0.0}, "rate=0"),
        ({"mean_span": 0.5}, "mean_span=0.5: expected 1 or more"),
        ({"special": SpecialTokens(vocab_size=10, eos=1)}, "sentinel"),
        ({"special": SpecialTokens(vocab_size=10, sentinels=(5,))}, "needs a eos token"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, words: str):
    with pytest.raises(RequestError, match=words):
        SpanCorruption(**{"special": SPECIAL, **changes})


def test_a_span_may_lie_anywhere():
    """Also at either end: a short document must not be asked for its ending every time."""
    starts = set()
    for seed in range(200):
        labels = OBJECTIVE.sample({"text": np.arange(100, 110)}, np.random.default_rng(seed)).labels
        starts.add(int(labels[1]))
    assert starts == set(range(100, 109))
