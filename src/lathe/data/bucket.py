"""Rows of one sample each, in an order in which a batch's rows are about equally long.

Where samples cannot share a row, a batch is as wide as its longest sample, and the others are padded to it. So
the epoch's drawn order is taken a pool at a time, each pool is sorted by length and cut into batches, and the
batches are shuffled. A pool of many batches keeps lengths within one close; drawing the pools anew each epoch keeps
batches from being the same samples every time.

The rows of one epoch follow those of the one before without a gap. The first batch of an epoch is therefore
short by what the last one of the epoch before left open, and all the others begin where a bucket begins.
"""

from __future__ import annotations

import numpy as np

from lathe.data.packing import Rows, alone
from lathe.objectives.base import IntArray

_BATCHES_IN_A_POOL = 64


def buckets(order: IntArray, widths: IntArray, size: int, epoch: int, rng: np.random.Generator) -> Rows:
    """A row for each piece, in buckets of `size` rows of about equal width.

    Args:
        order: the pieces' numbers, in the order drawn for the epoch.
        widths: positions that each piece takes, by its number.
        size: rows in a batch, on all ranks together.
        epoch: counted from 0; says how much of the last batch the epochs before have left open.
        rng: shuffles the buckets of a pool.
    """
    opening = min(-epoch * len(order) % size, len(order))
    whole = (len(order) - opening) // size * size
    laid = [order[:opening]]
    middle = order[opening : opening + whole]
    for start in range(0, whole, size * _BATCHES_IN_A_POOL):
        pool = middle[start : start + size * _BATCHES_IN_A_POOL]
        batches = pool[np.argsort(widths[pool], kind="stable")].reshape(-1, size)
        laid.append(batches[rng.permutation(len(batches))].ravel())
    laid.append(order[opening + whole :])
    return alone(np.concatenate(laid))
