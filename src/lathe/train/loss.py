"""The loss of a batch, computed where something is asked and nowhere else.

Masked language modelling asks 15 % of the positions, and padding asks none; yet the product with the token
table, often the largest of a small model, would be made for all. `label_logits` hands the language head only
the hidden states whose label counts.

A loss function is any `(model, batch) -> (mean loss, how many it is the mean of)`; the loop needs no more.

Shape suffixes: B batch, T positions, D d_model, N labels that count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.loss import IGNORED, check_labels, label_loss
from lathe.model.output import Output
from lathe.model.transformer import Transformer

LossFunction: TypeAlias = Callable[[Transformer, Batch], tuple[Tensor, int]]

# Labels of a row as a whole, beside those of its tokens.
SENTENCE_LABELS = ("next_sentence_label", "sentence_order_label")


def objective_loss(model: Transformer, batch: Batch) -> tuple[Tensor, int]:
    """The loss of the batch's own labels: mean cross-entropy in nats over the labels that are asked.

    A sentence label adds its own mean; a classifier's loss is its mean over rows.
    """
    if model.head.language is None:
        loss = model(**batch.inputs).loss
        if loss is None:
            raise RequestError("the batch has no labels: nothing to learn from")
        return loss, batch.targets
    logits_NV, targets_N, output = label_logits(model, batch)
    return mean_loss(logits_NV, targets_N) + sentence_loss(output, batch), len(targets_N)


def mean_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy in nats; 0 where there is no target."""
    return F.cross_entropy(widened(logits_NV), targets_N, reduction="sum") / max(len(targets_N), 1)


def sentence_loss(output: Output, batch: Batch) -> Tensor | float:
    """The loss of the labels that rows have as a whole, by the weight of the batch's rows; 0 where they have none."""
    sentence = next((batch.inputs[key] for key in SENTENCE_LABELS if key in batch.inputs), None)
    if sentence is None:
        return 0.0
    if output.seq_relationship_logits is None:
        raise RequestError("the batch has sentence labels and the model no sentence head; add a classifier")
    return batch.row_weight * label_loss(output.seq_relationship_logits, sentence)


def widened(tensor: Tensor) -> Tensor:
    """In float32, or as it is where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def label_logits(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Output]:
    """Logits where a label counts, N × V, those labels, N, and the rest of the output.

    A decoder alone predicts the next token: the logits before each label are returned.
    """
    labels_BT = batch.inputs["labels"]
    check_labels(labels_BT, model.architecture.embedding.vocab_size)
    if model.encoder is None:
        labels_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    asked_BT = labels_BT != IGNORED
    where = asked_BT.flatten().nonzero().squeeze(1)
    inputs = {key: value for key, value in batch.inputs.items() if key != "labels" and key not in SENTENCE_LABELS}
    with _head_reads(model, where):
        output = model(**inputs)
    assert output.logits is not None
    return output.logits, labels_BT.flatten()[where], output


@contextmanager
def _head_reads(model: Transformer, where: Tensor) -> Iterator[None]:
    """Hand the language head the hidden states at these places of the flattened batch alone."""

    def pick(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD, *rest = given
        return (hidden_BTD.flatten(0, 1).index_select(0, where), *rest)

    assert model.head.language is not None
    handle = model.head.language.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bfloat16 where `precision` is bf16; nothing where it is fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
