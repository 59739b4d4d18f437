"""Buckets: every row once, batches of one length, no gap between epochs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lathe.data.bucket import buckets


def rows_of(epochs: int, widths: np.ndarray, size: int) -> list[list[int]]:
    laid: list[list[int]] = []
    for epoch in range(epochs):
        rng = np.random.default_rng(epoch)
        order = rng.permutation(len(widths))
        rows = buckets(order, widths, size, epoch, rng)
        laid.append([int(rows.row(i)[0]) for i in range(len(rows))])
    return laid


@given(n=st.integers(1, 50), size=st.integers(1, 12), epochs=st.integers(1, 5))
def test_an_epoch_has_every_row_once(n: int, size: int, epochs: int):
    for epoch in rows_of(epochs, np.arange(n), size):
        assert sorted(epoch) == list(range(n))


def test_batches_are_of_one_length_also_where_epochs_meet():
    """Each bucket is cut from a sorted pool, so the batches of an epoch have lengths that do not overlap."""
    n, size = 1003, 8
    widths = np.random.default_rng(0).integers(5, 200, size=n)
    flat = [piece for epoch in rows_of(3, widths, size) for piece in epoch]
    batches = [widths[flat[i : i + size]] for i in range(0, len(flat), size)]
    spread = np.array([batch.max() - batch.min() for batch in batches])
    across = {0, n // size, 2 * n // size, len(batches) - 1}  # those may mix the ends of two epochs
    assert all(value < 20 for i, value in enumerate(spread) if i not in across)
    wasted = sum(batch.max() * len(batch) for batch in batches) / sum(batch.sum() for batch in batches)
    assert wasted < 1.05


def test_the_order_of_the_batches_is_drawn():
    widths = np.arange(400)
    first, second = rows_of(2, widths, 8)
    assert first != second
    starts = widths[first[::8]]
    assert (np.diff(starts) < 0).any()
    assert (np.diff(starts) > 0).any()
