"""How far a narrow model's predictions are from its parent's: what a fit has to bring down to stay.

With a language head it is the mean Kullback-Leibler divergence, in nats a token, of the child's distribution from the
parent's, where the objective asks for one (`labels`), else at every token. A classifier is compared by its logits and
a model without a head by its last stream in the child's channels: squares missed over squares wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.walk import asked_rows

_MOST_NUMBERS = 2**26  # of the parent's distributions: 256 MiB


class Divergence:
    """The parent's predictions on some text, to hold a child against.

    Args:
        parent: the model as it was.
        batches: text that fits nothing.
        into: old × new: the parent's stream in the child's channels.
    """

    def __init__(self, parent: Transformer, batches: Sequence[Batch], into: Tensor) -> None:
        self._kind = _kind(parent)
        self._batches: list[Batch] = []
        self._wanted: list[Tensor] = []
        self.often = torch.zeros(())  # the mean of what the parent predicts, over the vocabulary
        numbers = positions = 0
        for batch in batches:
            given = _predicted(parent, batch, self._kind)
            if self._kind == "stream":
                given = (given.to("cpu", torch.float64) @ into).to(given.dtype)
            if self._kind == "language":
                given = given.log_softmax(-1)
                self.often = self.often + given.exp().sum(0).to("cpu", torch.float64)
                positions += len(given)
            self._batches.append(batch)
            self._wanted.append(given)
            numbers += given.numel()
            if numbers >= _MOST_NUMBERS:
                break
        if positions:
            self.often = self.often / positions

    @property
    def measures(self) -> str:
        """What the number is, in words."""
        if self._kind == "language":
            return "divergence from the parent's predictions, nats a token"
        return f"share of the parent's {'labels' if self._kind == 'labels' else 'last stream'} missed"

    def __call__(self, child: Transformer) -> float:
        """The child's distance, on the same text."""
        missed = total = 0.0
        for batch, wanted in zip(self._batches, self._wanted):
            given = _predicted(child, batch, self._kind)
            if self._kind == "language":
                missed += float((wanted.exp() * (wanted - given.log_softmax(-1))).sum())
                total += len(wanted)
            else:
                asked = wanted.to("cpu", torch.float64)
                missed += float((given.to("cpu", torch.float64) - asked).square().sum())
                total += float(asked.square().sum())
        return missed / max(total, 1e-300)


def _kind(model: Transformer) -> str:
    if model.head.language is not None:
        return "language"
    return "labels" if model.head.classifier is not None else "stream"


def _predicted(model: Transformer, batch: Batch, kind: str) -> Tensor:
    with torch.no_grad():
        out = model(**batch)
    stream: Tensor = out.last_hidden_state
    rows = asked_rows(model, stream.shape[:2], batch)
    if kind == "stream":
        return stream.flatten(0, 1)[rows]
    logits: Tensor = out.logits
    if kind == "labels":
        return logits.flatten()[:, None]
    return logits.flatten(0, 1)[rows]
