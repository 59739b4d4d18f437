"""Healing: a cut model learns from its parent for a while, and gets back most of what it lost.

The parent's whole distribution is the loss (`lathe.train.Distillation`), and the text's own labels as far as `weight`
leaves them a share. By default it leaves none, as in Minitron (Muralidharan et al. 2024): the cut model has to find
again what its parent knows, and beside that what the labels of a short text say is mostly noise (docs/results.md has
the measurement). The objective, which says what both are asked, is the one that the model was trained with.

A healing starts from weights that are nearly right, and how far a step may move them depends on how large they are,
which differs a hundredfold between families and between a table and a matrix. So the optimiser is Adafactor, whose
steps are shares of each tensor's own size (Shazeer & Stern 2018, §8): one rate serves every family, where AdamW's best
rate for one spoils another.

Weights of 16 bits heal in float32 and are rounded once, at the end: most steps are smaller than the distance from one
number of 16 bits to the next. The matrix products of both models may be of 16 bits all the same (`precision`), as in
training.

A run lies in a directory and can be killed at any instant: called again, it goes on where the last checkpoint is
(`lathe.train.fit`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lathe.checkpoint.save import save_checkpoint
from lathe.data.batches import Batches
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.text import TextSettings, require_pair
from lathe.spec import Spec, choice, share, size
from lathe.text.tokenizer import Tokenizer
from lathe.train.distil import Distillation
from lathe.train.loop import StepReport, train
from lathe.train.loss import widened
from lathe.train.records import METRICS
from lathe.train.run import fit
from lathe.train.settings import OptimizerSettings, SaveSettings, ScheduleSettings, TrainSettings, chosen_precision

_STEPS = 200
_RATES = {"adafactor": 5e-3, "adamw": 1e-3}


@dataclass(frozen=True, kw_only=True)
class HealSettings(Spec):
    """How long a model heals, on what, and how its loss is made up."""

    file: str
    field: str = "text"  # the column, where the file has several
    format: str | None = None  # by the file's name
    steps: int | None = size(2**40, default=None)  # 200, where neither steps nor tokens are given
    tokens: int | None = size(2**60, default=None)  # of all stages together, as are the steps
    optimizer: str = choice("adafactor", "adamw", default="adafactor")
    lr: float | None = None  # 5e-3 of each tensor's own size with Adafactor, 1e-3 with AdamW
    weight: float = 1.0  # the parent's share of the loss, 0 to 1; the rest is the text's
    temperature: float = 1.0
    top_k: int | None = size(2**24, default=None)  # compare only the parent's likeliest tokens
    hidden: float = 0.0  # the weight of the hidden states' difference
    noise: float = share(0.0)  # of the tokens read, swapped for others: for a parent that knows its text by heart
    length: int | None = size(2**24, least=8, default=None)  # positions of a row; 256, or what the model has
    rows: int = size(2**20, default=16)
    accumulate: int = size(2**20, default=1)
    dropout: float = share(0.0)
    precision: str = choice("auto", "fp32", "bf16", default="auto")  # of the matrix products; auto: bf16 on CUDA
    seed: int = size(2**32 - 1, least=0, default=0)
    stages: int | None = size(2, default=None)  # two where more than half of an axis goes, else one
    whole: int | None = size(2**60, default=None)  # a stage's: how many tokens all stages read, one after the other
    save_every: int = size(2**40, default=100)  # steps
    source: str | None = None  # of pairs: the column that is read
    target: str | None = None  # and the column that is written
    prefix: str = ""  # what stands before each source

    def check(self) -> None:
        require_pair(self.field, self.source, self.target, self.prefix)
        if not 0.0 <= self.weight <= 1.0:
            raise RequestError(f"weight={self.weight}: expected the parent's share, 0 to 1")
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RequestError(f"{name}={value}: expected more than 0")
        if self.whole is not None and self.whole < self.most_tokens:
            raise RequestError(f"whole={self.whole}: expected the {self.most_tokens} tokens of this stage or more")
        if self.hidden < 0:
            raise RequestError(f"hidden={self.hidden}: expected 0 or more")

    @property
    def loss_in_words(self) -> str:
        """What is made small, for who reads the curve."""
        parts = ["the divergence from the parent's distribution"] if self.weight > 0 else []
        parts += ["the text's own labels"] if self.weight < 1 else []
        parts += ["the difference of the hidden states"] if self.hidden else []
        return " and ".join(parts)

    @property
    def text(self) -> TextSettings:
        """The text that it takes: no more than is read."""
        return TextSettings(
            file=self.file,
            field=self.field,
            format=self.format,
            tokens=self.whole or self.most_tokens,
            length=self.length,
            rows=self.rows,
            seed=self.seed,
            source=self.source,
            target=self.target,
            prefix=self.prefix,
        )

    @property
    def most_steps(self) -> int | None:
        """How many steps it takes at most; None where its tokens alone end it."""
        return _STEPS if self.steps is None and self.tokens is None else self.steps

    @property
    def most_tokens(self) -> int:
        """How many tokens the healing reads at most."""
        by_steps = None if self.most_steps is None else self.most_steps * self._tokens_a_step
        return min(each for each in (by_steps, self.tokens) if each is not None)

    @property
    def _tokens_a_step(self) -> int:
        return self.rows * (self.length or 256) * self.accumulate

    def parts(self, count: int) -> list[HealSettings]:
        """As many stages, as equal as they can be: together they are the whole, and so is the text that they read."""
        whole = self.most_tokens if count > 1 else None
        steps, tokens = _divided(self.most_steps, count), _divided(self.tokens, count)
        return [
            replace(self, steps=one, tokens=other, stages=1, whole=whole)
            for one, other in zip(steps, tokens, strict=True)
        ]

    def training(self, device_type: str = "cpu") -> TrainSettings:
        """The loop's settings on a device of that type: a short warm-up, a cosine down to nothing."""
        expected = -(-self.most_tokens // self._tokens_a_step)
        return TrainSettings(
            steps=self.most_steps,
            tokens=self.tokens,
            optimizer=OptimizerSettings(kind=self.optimizer, lr=self.lr or _RATES[self.optimizer]),
            schedule=ScheduleSettings(warmup=max(expected // 20, 1)),
            accumulate=self.accumulate,
            dropout=self.dropout,
            precision=chosen_precision(self.precision, device_type),
            seed=self.seed,
            spike=None,  # the loss of a model that was just cut falls from high up
        )


def _divided(budget: int | None, count: int) -> list[int | None]:
    if budget is None:
        return [None] * count
    return [max(budget * (number + 1) // count - budget * number // count, 1) for number in range(count)]


@dataclass(frozen=True)
class Healing:
    """How far a healing has come, however often it was interrupted.

    Args:
        steps, tokens: of all of it.
        curve: each step, counted from 1, and its loss.
    """

    steps: int
    tokens: int
    curve: list[tuple[int, float]]


def heal(
    model: Transformer,
    teacher: Transformer,
    batches: Batches,
    settings: HealSettings,
    folder: Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    config: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Healing:
    """Train `model` in place to do what `teacher` does.

    Args:
        teacher: a model of the same vocabulary; it is not changed, and lent to the device of `model` meanwhile.
        batches: the text.
        folder: where the run is kept, so that it can be killed and goes on; None: nowhere.
        tokenizer, config: what the checkpoints in `folder` carry besides the weights.
        asked: what a run in `folder` must have been asked as well, to be gone on with.

    Raises:
        RequestError: another vocabulary, or a run in `folder` that was asked something else.
        LatheError: the loss is no number any more, or the disk is full.
    """
    with _wide(model), _lent(teacher, model.device):
        loss = Distillation(
            teacher,
            weight=settings.weight,
            temperature=settings.temperature,
            top_k=settings.top_k,
            hidden=settings.hidden,
            noise=settings.noise,
            keep=batches.objective.special.ids,
        )
        training = settings.training(model.device.type)
        if folder is None:
            reports = train(model, batches, training, loss_fn=loss, on_step=on_step).steps
            done = Healing(reports[-1].step, reports[-1].tokens, [(each.step, each.loss) for each in reports])
        else:

            def write(path: Path) -> None:
                weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
                save_checkpoint(path, model.architecture, weights, tokenizer=tokenizer, config=config)

            mixture = [settings.weight, settings.temperature, settings.top_k, settings.hidden, settings.noise]
            fit(
                model,
                batches,
                training,
                folder,
                write_model=write,
                save=SaveSettings(every=settings.save_every, keep=1),
                loss_fn=loss,
                resume=True,
                asked={"distillation": mixture, **(asked or {})},
                on_step=on_step,
            )
            done = _written(folder)
    model.eval()
    return done


def _written(folder: Path) -> Healing:
    """What the run in `folder` has written down of its steps, those of earlier processes among them."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    curve = [(int(line["step"]), float(line["loss"])) for line in lines]
    return Healing(curve[-1][0], int(lines[-1]["tokens"]), curve)


@contextmanager
def _wide(model: Transformer) -> Iterator[None]:
    """Every weight in float32 at least; in the type that it had afterwards."""
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [(each, each.dtype) for each in tensors if each.is_floating_point() and widened(each) is not each]
    for tensor, _ in narrow:
        tensor.grad = None  # of the other type
        tensor.data = widened(tensor.data)
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _lent(teacher: Transformer, device: torch.device) -> Iterator[None]:
    """The teacher on a device, evaluating; where and as it was afterwards."""
    home, was_training = teacher.device, teacher.training
    teacher.eval()
    if home != device:
        teacher.to(device)
    try:
        yield
    finally:
        teacher.train(was_training)
        if home != device:
            teacher.to(home)
