"""Whole-word masking: a word is asked as a whole, within the same budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.objectives import IGNORED, Masked, SpecialTokens

CONTINUES = tuple(range(500, 900))
SPECIAL = SpecialTokens(vocab_size=1000, pad=0, cls=2, sep=3, mask=4, continues=CONTINUES)
OBJECTIVE = Masked(special=SPECIAL, whole_words=True)


def words(text: np.ndarray) -> list[list[int]]:
    found: list[list[int]] = []
    for place, token in enumerate(text.tolist()):
        if token in CONTINUES and found:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@given(lengths=st.lists(st.integers(1, 4), min_size=2, max_size=40), seed=st.integers(0, 1000))
def test_words_are_asked_as_a_whole_and_within_the_budget(lengths: list[int], seed: int):
    text = np.array([token for n in lengths for token in (100, *range(500, 499 + n))])
    labels = OBJECTIVE.hide(text, np.random.default_rng(seed))[1]
    asked = set(np.flatnonzero(labels != IGNORED).tolist())
    touched = [word for word in words(text) if asked & set(word)]
    assert asked == {place for word in touched for place in word}
    budget = max(round(0.15 * len(text)), 1)
    assert len(asked) <= budget or len(touched) == 1
    assert asked
    left_out = [len(word) for word in words(text) if not asked & set(word)]
    assert all(n > budget - len(asked) for n in left_out)


def test_a_golden_choice():
    text = np.array([100, 500, 101, 102, 501, 502, 103, 104, 503, 105, 106, 107, 108, 109])
    labels = OBJECTIVE.hide(text, np.random.Generator(np.random.PCG64([0, 0, 0])))[1]
    assert np.flatnonzero(labels != IGNORED).tolist() == GOLDEN


def test_a_tokenizer_of_whole_words_is_refused():
    with pytest.raises(RequestError, match="a token is a word already"):
        Masked(special=replace(SPECIAL, continues=()), whole_words=True)


GOLDEN: list[int] = [7, 8]
