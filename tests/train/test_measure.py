"""Macro F1 and bits per byte against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lathe.train.measure import bits_per_byte, macro_f1


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    # Class 0: 3 of 4 found, 1 of 4 answers wrong. Class 1: 1 of 2 found, 1 of 2 answers wrong. Class 2 never occurs.
    counts = torch.tensor([[3, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert macro_f1(counts) == pytest.approx((0.75 + 0.5) / 2)
    # Always the commonest class: right three times in four, and worth little.
    assert macro_f1(torch.tensor([[3, 0], [1, 0]])) == pytest.approx((6 / 7) / 2)


def test_a_uniform_guess_over_bytes_is_eight_bits():
    assert bits_per_byte(math.log(256), tokens=10, n_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=5, n_bytes=10) == pytest.approx(4)
