"""The mean loss over a fixed set of batches, weighted by what each batch asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train.loss import LossFunction, autocast, objective_loss
from lathe.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats a target, over `targets` of them."""

    loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def fingerprint(batches: Sequence[Batch]) -> str:
    """A short name of a fixed set: how many batches it has, and a digest of what they hold."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.inputs.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return f"{len(batches)} batches, sha256 {digest.hexdigest()[:16]}"


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFunction = objective_loss,
    precision: str = "fp32",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The model's loss on `batches`, without dropout; the model's mode is left as it was.

    Several ranks take turns at the batches, and all get the number that one alone would get, to the bit: each
    batch's loss is added in the batches' order.

    Raises:
        RequestError: there is no batch, or nothing is asked in any.
    """
    was_training = model.training
    model.eval()
    every = list(batches)
    mine: list[tuple[float, int]] = []
    try:
        with torch.no_grad(), autocast(model.device, precision):
            for first in range(0, len(every), ranks.size):
                # In the last round there may be too few: whoever has none computes one that is not counted, since
                # ranks that hold parts of the weights need each other in every forward pass.
                turn = min(first + ranks.rank, len(every) - 1)
                loss, n = loss_fn(model, every[turn].to(model.device))
                mine.append((loss.item() * n, n))
    finally:
        model.train(was_training)
    of_ranks = ranks.gather(mine)
    found = [of_ranks[i % ranks.size][i // ranks.size] for i in range(len(every))]
    targets = sum(n for _, n in found)
    if not targets:
        raise RequestError("nothing to evaluate on: the batches ask no label")
    return Evaluation(sum((loss for loss, _ in found), 0.0) / targets, targets)
