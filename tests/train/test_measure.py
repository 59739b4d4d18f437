"""Macro F1 and bits per byte against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch

import lathe
from lathe.data import Batches, Corpus
from lathe.objectives import SpecialTokens
from lathe.objectives.by_name import objective
from lathe.train.measure import bits_per_byte, classify, macro_f1


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    # Class 0: 3 of 4 found, 1 of 4 answers wrong. Class 1: 1 of 2 found, 1 of 2 answers wrong. Class 2 never occurs.
    counts = torch.tensor([[3, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert macro_f1(counts) == pytest.approx((0.75 + 0.5) / 2)
    # Always the commonest class: right three times in four, and worth little.
    assert macro_f1(torch.tensor([[3, 0], [1, 0]])) == pytest.approx((6 / 7) / 2)


def test_a_uniform_guess_over_bytes_is_eight_bits():
    assert bits_per_byte(math.log(256), tokens=10, n_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=5, n_bytes=10) == pytest.approx(4)


def test_a_classifier_is_judged_row_by_row():
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 24, "vocab_size": 40}
    model = lathe.Model(lathe.preset("bert-base-uncased", "classification").with_(sizes).with_(n_labels=3), seed=0)
    special = SpecialTokens(vocab_size=40, pad=0, cls=1, sep=2, front=(1,), back=(2,))
    texts = [list(range(5 + i, 9 + 2 * i)) for i in range(11)]
    labels = [i % 3 for i in range(11)]
    corpus = Corpus.of(40, text=texts, labels=labels)
    batches = Batches(corpus, objective("classification", special, n_labels=3), length=32, rows=4)
    found = classify(model, batches.one_pass())
    answers = [int(model(torch.tensor([[1, *text, 2]])).logits.argmax()) for text in texts]
    assert found.rows == 11
    assert found.accuracy == sum(a == b for a, b in zip(answers, labels)) / 11
    each = []
    for kind in {*answers, *labels}:
        hit = sum(a == b == kind for a, b in zip(answers, labels))
        precision, recall = (hit / max(sum(x == kind for x in of), 1) for of in (answers, labels))
        each.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    assert found.f1 == pytest.approx(sum(each) / len(each))
