"""Which keys a query may see: causal order, padding, packed documents and windows, as one object.

A batch holds sequences of different lengths, so short ones are padded; the padding mask hides the pads
from every query. A causal stack hides what comes later. Packing lays several documents into one row;
`segments` keeps each document to itself. A window hides what lies too far back (Mistral). All of them
are comparisons of small integers, combined once per forward and used by every layer.

Nothing to hide beyond causal order needs no tensor at all: `Mask(causal=True)` lets the fused kernel
skip the upper triangle instead of reading a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """`allowed` is boolean and broadcasts to B × H × T × S, or None where order alone decides."""

    allowed: Tensor | None = None
    causal: bool = False  # read only where `allowed` is None

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
        """The mask as a tensor, or None where every query sees every key."""
        if self.allowed is not None or not self.causal:
            return self.allowed
        return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril()


def drop_if_full(mask_BS: Tensor | None) -> Tensor | None:
    """None for a padding mask that hides nothing, so that the fused path is taken; asks only CPU tensors."""
    if mask_BS is None or torch.compiler.is_compiling() or mask_BS.device.type != "cpu":
        return mask_BS
    return None if bool(mask_BS.all()) else mask_BS


def self_mask(
    *,
    causal: bool,
    padding_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    window: int | None = None,
    length: int,
    device: torch.device,
) -> Mask:
    """The mask of a stack that attends to itself, without a cache.

    Args:
        padding_BT: 1 for a token, 0 for a pad.
        segments_BT: the number of the document that each token belongs to (packing).
        window: how many tokens a query sees, itself included.
        length: T.
    """
    windowed = window is not None and window < length
    if padding_BT is None and segments_BT is None and not windowed:
        return Mask(causal=causal)
    order_T = torch.arange(length, device=device)
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed & (order_T[:, None] >= order_T[None, :])
    if windowed:
        assert window is not None
        allowed = allowed & (order_T[:, None] - order_T[None, :] < window)
    if segments_BT is not None:
        allowed = allowed & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    if padding_BT is not None:
        visible = padding_BT[:, None, None, :].bool()
        if causal or segments_BT is not None:
            # A pad that has no token in sight sees itself, so that no row of scores is empty; nobody else sees it.
            # An encoder's pads see the tokens, as in `transformers`: BERT's pooler reads one where pads come first.
            visible = visible | (order_T[:, None] == order_T[None, :])
        allowed = allowed & visible
    return Mask(allowed)


def memory_mask(
    padding_BS: Tensor | None, segments_BT: Tensor | None = None, memory_segments_BS: Tensor | None = None
) -> Mask:
    """The mask of a decoder that attends to an encoder's output."""
    allowed: Tensor | None = None
    if segments_BT is not None and memory_segments_BS is not None:
        allowed = segments_BT[:, None, :, None] == memory_segments_BS[:, None, None, :]
    if padding_BS is not None:
        visible = padding_BS[:, None, None, :].bool()
        allowed = visible if allowed is None else allowed & visible
    return Mask(allowed)


def cached_mask(slots_BT: Tensor, n_slots: int, window: int | None = None) -> Mask:
    """The mask over a cache: a query sees the slots up to its own.

    Args:
        slots_BT: the slot into which each new token is written.
        n_slots: how many slots are read.
        window: how many tokens a query sees, itself included.
    """
    keys_S = torch.arange(n_slots, device=slots_BT.device)
    allowed = keys_S <= slots_BT[..., None]
    if window is not None:
        allowed = allowed & (slots_BT[..., None] - keys_S < window)
    return Mask(allowed[:, None])
