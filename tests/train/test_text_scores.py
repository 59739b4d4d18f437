"""Exact match, BLEU and chrF against figures that follow from their definitions."""

from __future__ import annotations

import math

import pytest

from lathe.errors import RequestError
from lathe.train.text_scores import BLEU_TOKENIZERS, score_texts


def test_the_reference_itself_scores_full_marks_and_another_text_none():
    texts = ["the lathe turns wood and metal", "a fox jumps over the lazy dog"]
    same = score_texts([texts[0] + " ", texts[1]], texts)
    assert (same.exact_match, same.chrf, same.chrf_plus_plus) == (1.0, 100.0, 100.0)
    assert same.bleu == pytest.approx(100)
    other = score_texts(["xyz"] * 2, texts)
    assert other.exact_match == 0
    assert other.bleu < 1
    assert other.chrf < 5


def test_bleu_is_the_mean_of_the_four_precisions_times_the_penalty_for_brevity():
    found = score_texts(["a b c d e f"], ["a b c d e x y"], bleu_tokenize="none")
    precisions = [5 / 6, 4 / 5, 3 / 4, 2 / 3]
    mean = math.exp(sum(map(math.log, precisions)) / 4)
    assert found.bleu == pytest.approx(100 * mean * math.exp(1 - 7 / 6))


def test_chrf_counts_recall_twice():
    # Of "ab" against "abc": both characters and the one pair are right; 2 of 3 and 1 of 2 of the reference are found.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    # Runs that are longer than the output are left out of both means.
    assert score_texts(["ab"], ["abc"]).chrf == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_a_word_is_what_the_tokenizer_says_and_the_signature_tells_which():
    outputs, references = ["정말 재미있어요"], ["정말 재미있네요"]
    by_character = score_texts(outputs, references, bleu_tokenize="char")
    assert by_character.bleu > score_texts(outputs, references).bleu
    assert "tok:char" in by_character.signatures["bleu"]
    assert "nw:2" in by_character.signatures["chrf++"]
    for name in BLEU_TOKENIZERS:  # none of them fetches anything
        assert f"tok:{name}" in score_texts(outputs, references, bleu_tokenize=name).signatures["bleu"]


def test_every_output_has_a_reference():
    with pytest.raises(RequestError, match="2 outputs and 1 references"):
        score_texts(["a", "b"], ["a"])
    with pytest.raises(RequestError, match="0 outputs"):
        score_texts([], [])
