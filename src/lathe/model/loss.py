"""The losses that a model computes itself when it is given labels.

Labels of −100 do not count, as in `transformers`. A decoder alone predicts the next token, so its labels
are the inputs shifted by one; other models' labels stand where the prediction does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.errors import RequestError

IGNORED = -100


def token_loss(logits_BTV: Tensor, labels_BT: Tensor, *, shifted: bool) -> Tensor:
    """Mean cross-entropy in nats over the labels that count.

    Args:
        shifted: whether position t predicts label t + 1 (a decoder alone).
    """
    check_labels(labels_BT, logits_BTV.shape[-1])
    if shifted:
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORED)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class numbers, binary cross-entropy for several float labels, squared error for one.

    Args:
        logits: … × n_labels.
        labels: … class numbers, or floats of the logits' shape.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).float(), labels.float().reshape(logits.shape[:-1]))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits.float(), labels)
    check_labels(labels, logits.shape[-1])
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def mark_loss(logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean binary cross-entropy of one yes-or-no mark a token (ELECTRA §3.1), pads left out."""
    check_labels(labels_BT, 2)
    counts_BT = labels_BT != IGNORED
    if mask_BT is not None:
        counts_BT = counts_BT & mask_BT.bool()
    return F.binary_cross_entropy_with_logits(logits_BT[counts_BT].float(), labels_BT[counts_BT].float())


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise `RequestError` for a label that names no class; asks only CPU tensors, which cost no wait."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((labels < 0) & (labels != IGNORED)) | (labels >= n_classes)
    if bool(bad.any()):
        where = [int(i) for i in bad.nonzero()[0]]
        raise RequestError(
            f"label {int(labels[tuple(where)])} at {where}: "
            f"expected 0 to {n_classes - 1:,}, or {IGNORED} to leave it out"
        )
