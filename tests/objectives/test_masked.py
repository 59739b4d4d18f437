"""BERT's masking: who is chosen, what is shown, what is asked."""

from __future__ import annotations

import numpy as np
import pytest

from lathe.errors import RequestError
from lathe.objectives import IGNORED, Masked, SpecialTokens


def test_a_golden_sample(special: SpecialTokens):
    rng = np.random.Generator(np.random.PCG64([0, 0, 0]))
    sample = Masked(special=special).sample({"text": np.arange(100, 120)}, rng)
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == GOLDEN


GOLDEN = (
    [2, 100, 101, 102, 103, 4, 105, 4, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 4, 3],
    [
        -100,
        -100,
        -100,
        -100,
        -100,
        104,
        -100,
        106,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        -100,
        119,
        -100,
    ],
)


def test_marks_frame_the_text_and_are_never_asked(special: SpecialTokens):
    objective = Masked(special=special)
    for seed in range(20):
        sample = objective.sample({"text": np.arange(100, 110)}, np.random.default_rng(seed))
        assert sample.input_ids[0] == special.cls
        assert sample.input_ids[-1] == special.sep
        assert sample.labels[0] == sample.labels[-1] == IGNORED
        assert objective.widths(np.array([10]))[0][0] == len(sample.input_ids) == len(sample.labels)


def test_shares_are_those_of_the_paper(special: SpecialTokens):
    """BERT §3.1: 15 % asked, of which 80 % hidden, 10 % another token, 10 % as they are."""
    text = np.full(20_000, 500)
    shown, labels = Masked(special=special).hide(text, np.random.default_rng(0))
    asked = labels != IGNORED
    assert asked.sum() == 3000
    assert (labels[asked] == 500).all()
    assert (shown[~asked] == 500).all()
    seen = shown[asked]
    assert np.mean(seen == special.mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean(seen == 500) == pytest.approx(0.1, abs=0.02)
    others = seen[(seen != special.mask) & (seen != 500)]
    assert set(others.tolist()) <= set(special.ordinary.tolist())
    assert len(set(others.tolist())) > 100


def test_ordinary_tokens_leave_out_every_special_one(special: SpecialTokens):
    ordinary = special.ordinary
    assert ordinary.tolist() == list(range(7, 900))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0.0}, "rate=0"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"masked": 0.8, "random": 0.3}, "sum of at most 1"),
        ({"special": SpecialTokens(vocab_size=10, cls=1, sep=2)}, "mask token"),
    ],
)
def test_what_cannot_be_is_refused(special: SpecialTokens, changes: dict, words: str):
    with pytest.raises(RequestError, match=words):
        Masked(**{"special": special, **changes})
