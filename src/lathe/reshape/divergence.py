"""How far a narrow model's predictions are from its parent's: what a fit has to bring down to stay.

With a language head it is the mean Kullback-Leibler divergence, in nats a token, of the child's distribution from the
parent's, where the objective asks for one (`labels`), else at every token. A classifier is compared by its logits and
a model without a head by its last stream in the child's channels: squares missed over squares wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.stream import blank, heads_held, last_streams
from lathe.reshape.walk import asked_rows, shape_of, standing

_MOST_NUMBERS = 2**26  # of the parent's distributions: 256 MiB
_AT_ONCE = 2**22  # of them: 16 MiB


class Divergence:
    """The parent's predictions on some text, to hold a child against.

    Args:
        parent: the model as it was.
        batches: text that fits nothing.
        into: old × new: the parent's stream in the child's channels.
    """

    def __init__(self, parent: Transformer, batches: Sequence[Batch], into: Tensor) -> None:
        self._kind = _kind(parent)
        self._batches = _enough(parent, batches, self._kind)
        self._wanted = blank(parent)
        self.often = torch.zeros(())  # the mean of what the parent predicts, over the vocabulary
        positions = 0
        for number, given in enumerate(_predicted(parent, self._batches, self._kind)):
            if self._kind == "stream":
                given = (given.to("cpu", torch.float64) @ into).to(given.dtype)
            if self._kind == "language":
                given = given.log_softmax(-1)
                self.often = self.often + given.exp().sum(0).to("cpu", torch.float64)
                positions += len(given)
            self._wanted[str(number)] = given
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
        for number, given in enumerate(_predicted(child, self._batches, self._kind)):
            wanted = self._wanted[str(number)]
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


def _enough(model: Transformer, batches: Sequence[Batch], kind: str) -> list[Batch]:
    """As many of the batches as make the parent's predictions small enough to keep."""
    name = list(model.architecture.stacks)[-1][0]
    width = model.architecture.embedding.vocab_size if kind == "language" else model.architecture.d_model
    some: list[Batch] = []
    numbers = 0
    for batch in batches:
        some.append(batch)
        numbers += int(asked_rows(model, shape_of(model, name, batch), batch).sum()) * width
        if numbers >= _MOST_NUMBERS:
            break
    return some


@torch.no_grad()
def _predicted(model: Transformer, batches: Sequence[Batch], kind: str) -> Iterator[Tensor]:
    """What the model says where it is asked, some rows at a time: no more logits are there at once than that."""
    ends = last_streams(model, batches)
    with nullcontext() if kind == "stream" else heads_held(model):
        for batch, left_BTD in ends:
            asked = asked_rows(model, left_BTD.shape[:2], batch)
            if kind == "stream":
                yield left_BTD.flatten(0, 1)[asked]
            elif kind == "labels":
                with standing(model, left_BTD):
                    logits: Tensor = model(**batch).logits
                yield (logits.flatten(0, 1)[asked] if model.head.token == "each" else logits).reshape(-1, 1)
            else:
                head = model.head.language
                assert head is not None
                at_once = max(_AT_ONCE // model.architecture.embedding.vocab_size, 1)
                for part_ND in left_BTD.flatten(0, 1)[asked].split(at_once):
                    given: Tensor = head(part_ND[None], model.embedding.tokens)[0]
                    yield given
