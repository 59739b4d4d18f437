"""The mean loss over a fixed set of batches, weighted by what each batch asks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train.loss import LossFunction, autocast, objective_loss


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats a target, over `targets` of them."""

    loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFunction = objective_loss,
    precision: str = "fp32",
) -> Evaluation:
    """The model's loss on `batches`, without dropout; the model's mode is left as it was.

    Raises:
        RequestError: there is no batch, or nothing is asked in any.
    """
    was_training = model.training
    model.eval()
    total, targets = 0.0, 0
    try:
        with torch.no_grad(), autocast(model.device, precision):
            for batch in batches:
                loss, n = loss_fn(model, batch.to(model.device))
                total, targets = total + loss.item() * n, targets + n
    finally:
        model.train(was_training)
    if not targets:
        raise RequestError("nothing to evaluate on: the batches ask no label")
    return Evaluation(total / targets, targets)
