"""What a cut costs, measured: loss, the change of the logits, size, and speed beside another model in the same minutes.

Loss is the mean over the labels that the objective asks, in nats. For a causal model it is also given in bits for each
byte of text, which can be compared between tokenizers. The change of the logits is relative: the root mean square of
the difference over that of the logits before. Speed is tokens read a second; the models take turns and each one's
median counts, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.blueprint import stored
from lathe.checkpoint.layout import find_weights
from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.stream import StreamedTransformer, heads_held, last_streams
from lathe.reshape.text import Text
from lathe.reshape.walk import standing
from lathe.train.evaluate import Evaluation, evaluate
from lathe.train.loss import SENTENCE_LABELS, objective_loss
from lathe.train.measure import bits_per_byte

_ROUNDS = 5
_SPEED_BATCHES = 4
_LOGITS_AT_ONCE = 2**24  # numbers: 64 MiB


@dataclass(frozen=True)
class Quality:
    """How well a model does on a text.

    Args:
        loss: nats a label.
        bits_per_byte: of a causal model.
    """

    loss: float
    targets: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def quality(model: Transformer, text: Text) -> Quality | None:
    """The model's loss on a text; None where the model predicts no token."""
    if text.objective is None:
        return None
    streamed = isinstance(model, StreamedTransformer)
    found = _evaluated(model, text.batches) if streamed else evaluate(model, text.batches)
    bits = None if text.targets_of_text is None else bits_per_byte(found.loss, text.targets_of_text, text.n_bytes)
    return Quality(found.loss, found.targets, bits)


@torch.no_grad()
def _evaluated(model: Transformer, batches: Sequence[Batch]) -> Evaluation:
    """A streamed model's loss: the batches pass it layer by layer, and few rows have their logits at once."""
    total, targets = 0.0, 0
    ends = last_streams(model, [batch.inputs for batch in batches])
    with heads_held(model):
        for batch, (_, left_BTD) in zip(batches, ends, strict=True):
            rows, length = left_BTD.shape[:2]
            many = max(_LOGITS_AT_ONCE // (length * model.architecture.embedding.vocab_size), 1)
            if any(label in batch.inputs for label in SENTENCE_LABELS):  # their mean is the whole batch'
                many = rows
            for start in range(0, rows, many):
                some = slice(start, start + many)
                part = replace(batch, inputs={key: each[some] for key, each in batch.inputs.items()})
                with standing(model, left_BTD[some]):
                    loss, asked = objective_loss(model, part)
                total, targets = total + loss.item() * asked, targets + asked
    if not targets:
        raise RequestError("nothing to evaluate on: the batches ask no label")
    return Evaluation(total / targets, targets)


def parameters_of(model: Transformer) -> int:
    """How many trained numbers the model holds, tied tensors counted once."""
    return sum(p.size for p in stored(model.architecture) if p.trained)


def weight_bytes(directory: Path) -> int:
    """Bytes of the files that hold a checkpoint's weights."""
    return sum(path.stat().st_size for path in find_weights(directory).files)


def change(before: Tensor, after: Tensor) -> float | None:
    """The root mean square of the difference over that of `before`; None where the shapes are no longer the same."""
    if before.shape != after.shape:
        return None
    size = float(before.double().square().sum())
    difference = float((before.double() - after.double()).square().sum())
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def speeds(pairs: Mapping[str, tuple[Transformer, Sequence[Batch]]]) -> dict[str, float]:
    """Tokens read a second by each model, on its own batches; the models take turns.

    Raises:
        RequestError: a model without a batch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for name, (model, batches) in pairs.items():
        if not batches:
            raise RequestError(f"there is no text to time {name} on")
        model.eval()
    with torch.no_grad():
        for turn in range(_ROUNDS + 1):
            for name, (model, batches) in pairs.items():
                moved = [batch.to(model.device) for batch in batches[:_SPEED_BATCHES]]
                _wait(model)
                started = time.perf_counter()
                for batch in moved:
                    model(**batch.inputs)
                _wait(model)
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    return {
        name: sum(batch.tokens for batch in batches[:_SPEED_BATCHES]) / max(statistics.median(seconds[name]), 1e-9)
        for name, (_, batches) in pairs.items()
    }


def _wait(model: Transformer) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def sample_ids(model: Transformer, text: Text | None, seed: int) -> Tensor:
    """A few rows of plain token ids, for comparing two programs: from the text, or drawn where there is none."""
    if text is not None:
        ids = text.batches[0].inputs["input_ids"]
        return ids[:2, : min(32, ids.shape[1])].cpu()
    vocab = model.architecture.embedding.vocab_size
    limits = [stack.positions.limit for _, stack in model.architecture.stacks]
    length = min([32, *(limit for limit in limits if limit is not None)])
    ids = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    if model.architecture.tokens.eos:  # a pooler may look for it
        ids[:, -1] = model.architecture.tokens.eos[0]
    return ids


def is_two_sided(model: Transformer) -> bool:
    """Whether the model has an encoder and a decoder, and so takes ids for both."""
    return model.encoder is not None and model.decoder is not None


def logits_of(model: Any, ids: Tensor, *, both: bool) -> Tensor:
    """Logits (or last hidden states) of Lathe's model or of a stock one, on the same plain ids; on the CPU."""
    ids = ids.to(model.device)
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}
    training = model.training
    model.eval()
    with torch.no_grad():
        made = model(**given)
    model.train(training)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        found = getattr(made, name, None)
        if found is not None:
            return torch.as_tensor(found).float().cpu()
    raise AssertionError("the model returned neither logits nor hidden states")
