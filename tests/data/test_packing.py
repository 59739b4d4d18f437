"""Cutting and packing lose nothing and overfill nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lathe.data.packing import alone, cut, pack


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=20),
    window=st.integers(8, 20),
    least=st.integers(1, 4),
)
def test_every_token_is_in_one_piece(lengths: list[int], window: int, least: int):
    pieces = cut(np.array(lengths), window, least)
    assert (pieces.lengths <= window).all()
    assert (pieces.lengths >= least).all()
    for document, length in enumerate(lengths):
        mine = pieces.document == document
        covered = [t for a, b in zip(pieces.start[mine], pieces.stop[mine]) for t in range(a, b)]
        assert covered == (list(range(length)) if length >= least else [])


@given(
    widths=st.lists(st.tuples(st.integers(1, 10), st.integers(0, 6)), min_size=1, max_size=60),
    seed=st.integers(0, 10),
)
def test_rows_hold_each_piece_once_within_both_capacities(widths: list[tuple[int, int]], seed: int):
    first, second = (np.array(side) for side in zip(*widths))
    order = np.random.default_rng(seed).permutation(len(widths))
    rows = pack(order, (first, second), (10, 6))
    assert sorted(rows.pieces.tolist()) == list(range(len(widths)))
    for i in range(len(rows)):
        held = rows.row(i)
        assert len(held)
        assert first[held].sum() <= 10
        assert second[held].sum() <= 6


def test_short_documents_fill_rows():
    lengths = np.random.default_rng(0).integers(5, 40, size=2000)
    rows = pack(np.arange(2000), (lengths, np.zeros_like(lengths)), (128, 0))
    assert lengths.sum() / (len(rows) * 128) > 0.98


def test_alone_gives_each_piece_a_row():
    rows = alone(np.array([2, 0, 1]))
    assert [rows.row(i).tolist() for i in range(3)] == [[2], [0], [1]]
