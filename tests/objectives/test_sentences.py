"""Sentence order and next sentence: where a piece is cut, what is shown, and the label that says it."""

from __future__ import annotations

import numpy as np
import pytest

from lathe.errors import RequestError
from lathe.objectives import IGNORED, NextSentence, Sample, SentenceOrder, SpecialTokens
from lathe.presets import preset

TEXT, BREAKS = np.arange(100, 110), np.array([3, 7])


def original(sample: Sample) -> tuple[list[int], list[int]]:
    """The two segments as they were before masking, checked against the marks and the token types."""
    ids = np.where(sample.labels != IGNORED, sample.labels, sample.input_ids)
    assert ids[0] == 2
    assert ids[-1] == 3
    middle = int(np.flatnonzero(ids == 3)[0])
    assert sample.token_type_ids is not None
    assert sample.token_type_ids.tolist() == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
    return ids[1:middle].tolist(), ids[middle + 1 : -1].tolist()


def test_a_golden_sample_of_sentence_order(special: SpecialTokens):
    rng = np.random.Generator(np.random.PCG64([0, 0, 0]))
    sample = SentenceOrder(special=special).sample({"text": TEXT, "breaks": BREAKS}, rng)
    assert sample.input_ids.tolist() == ORDER[0]
    assert np.flatnonzero(sample.labels != IGNORED).tolist() == ORDER[1]
    assert sample.numbers == ORDER[2]


def test_segments_are_whole_sentences_exchanged_half_the_time(special: SpecialTokens):
    """ALBERT §3.1: both segments come from the piece, and the label says which was first."""
    objective, seen = SentenceOrder(special=special), []
    for seed in range(400):
        sample = objective.sample({"text": TEXT, "breaks": BREAKS}, np.random.default_rng(seed))
        label = sample.numbers["sentence_order_label"]
        first, second = original(sample)[:: -1 if label else 1]
        assert first + second == TEXT.tolist()
        assert len(first) in (3, 7)
        seen.append((label, len(first)))
    for outcome in ((0, 3), (0, 7), (1, 3), (1, 7)):
        assert 70 < seen.count(outcome) < 130  # 100 expected


def test_a_piece_of_one_sentence_is_cut_anywhere(special: SpecialTokens):
    objective, cuts = SentenceOrder(special=special), set()
    for seed in range(200):
        sample = objective.sample({"text": TEXT[:4], "breaks": np.zeros(0, np.int64)}, np.random.default_rng(seed))
        cuts.add(len(original(sample)[sample.numbers["sentence_order_label"]]))
    assert cuts == {1, 2, 3}


def test_a_golden_sample_of_next_sentence(special: SpecialTokens):
    rng = np.random.Generator(np.random.PCG64([0, 0, 2]))
    record = {"text": TEXT, "breaks": BREAKS, "other": np.arange(500, 520), "other_breaks": np.array([10])}
    sample = NextSentence(special=special).sample(record, rng)
    assert sample.input_ids.tolist() == NEXT[0]
    assert np.flatnonzero(sample.labels != IGNORED).tolist() == NEXT[1]
    assert sample.numbers == NEXT[2]


def test_the_second_segment_is_another_documents_half_the_time(special: SpecialTokens):
    objective, labels = NextSentence(special=special), []
    record = {"text": TEXT, "breaks": BREAKS, "other": np.arange(500, 512), "other_breaks": np.array([10])}
    for seed in range(400):
        sample = objective.sample(record, np.random.default_rng(seed))
        first, second = original(sample)
        labels.append(sample.numbers["next_sentence_label"])
        assert first == TEXT[: len(first)].tolist()
        if labels[-1]:
            assert second[0] in (500, 510)
            assert second == list(range(second[0], min(second[0] + 10 - len(first), 512)))
        else:
            assert second == TEXT[len(first) :].tolist()
        assert len(sample.input_ids) <= objective.widths(np.array([len(TEXT)]))[0][0]
    assert 160 < sum(labels) < 240


def test_a_model_without_the_head_or_the_types_is_refused(special: SpecialTokens):
    bert = preset("bert-base-uncased", head="masked")
    with pytest.raises(RequestError, match="classifier has no labels; give it a classifier of 2"):
        SentenceOrder(special=special).fit(bert)
    with pytest.raises(RequestError, match="needs a mask token"):
        NextSentence(special=SpecialTokens(vocab_size=10, cls=1, sep=2))


ORDER: tuple = ([2, 107, 108, 109, 3, 100, 4, 102, 4, 104, 105, 106, 3], [6, 8], {"sentence_order_label": 1})
NEXT: tuple = ([2, 100, 101, 102, 3, 500, 4, 502, 503, 504, 505, 4, 3], [6, 11], {"next_sentence_label": 1})
