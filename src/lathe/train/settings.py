"""Every number of a training run, typed; an unknown key is refused with the line that says what was expected.

TrainSettings.from_dict({"steps": 500, "optimizer": {"lr": 1e-3}, "schedule": {"kind": "wsd"}})
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe.errors import RequestError
from lathe.spec import Spec, choice, share, size


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Spec):
    """AdamW (Loshchilov & Hutter 2019) or Adafactor. Weight decay is on matrices alone, never on norms and biases."""

    kind: str = choice("adamw", "adafactor", default="adamw")
    lr: float = 1e-3
    beta1: float = share(0.9)
    beta2: float = share(0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = 1.0  # the gradient's norm is cut to this; none: as it is

    def check(self) -> None:
        for name, usual in (("beta1", 0.9), ("beta2", 0.98), ("eps", 1e-8)):
            if self.kind == "adafactor" and getattr(self, name) != usual:
                raise RequestError(f"{name}={getattr(self, name)}: adafactor has no {name}; leave it out")
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise RequestError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.weight_decay < 0:
            raise RequestError(f"weight_decay={self.weight_decay}: expected 0 or more")
        if self.clip is not None and self.clip <= 0:
            raise RequestError(f"clip={self.clip}: expected more than 0, or none for no clipping")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Spec):
    """How the learning rate moves from 0 up to its peak and down again; see `lathe.train.schedule`."""

    kind: str = choice("cosine", "linear", "inverse_sqrt", "wsd", "constant", default="cosine")
    warmup: int = size(2**30, least=0, default=0)  # steps
    decay: float = share(0.2)  # wsd: the share of the budget, at its end, in which the rate falls
    floor: float = share(0.0)  # the share of the peak at which the fall ends


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Spec):
    """One training run. The run ends when the first of its budgets is spent; at least one must be given."""

    steps: int | None = size(2**40, default=None)
    tokens: int | None = size(2**60, default=None)  # padding not counted
    seconds: float | None = None  # for people: how far it gets depends on the machine
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    accumulate: int = size(2**20, default=1)  # batches in a step
    precision: str = choice("fp32", "bf16", default="fp32")  # of the matrix products; weights stay as they are
    parallel: str = choice("auto", "none", "ddp", "fsdp", default="auto")  # over torchrun's processes; auto: ddp
    compile: bool = False  # each layer's attention and feed-forward through torch.compile: slow to start, then faster
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work
    dropout: float | None = share(None)  # type: ignore[arg-type]  # in place of every dropout of the model
    seed: int = size(2**32 - 1, least=0, default=0)  # of dropout; the data has its own
    evaluate_every: int | None = size(2**40, default=None)  # steps; none: once, at the end
    spike: float | None = 3.0  # stop when a step's loss is this far above the recent mean, in nats; none: never

    def check(self) -> None:
        if self.steps is None and self.tokens is None and self.seconds is None:
            raise RequestError("the run has no end: give steps, tokens or seconds")
        for name in ("seconds", "spike"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RequestError(f"{name}={value}: expected more than 0, or none")


def chosen_precision(asked: str, device_type: str) -> str:
    """Of matrix products on a device of that type; "auto" is bf16 on CUDA and fp32 elsewhere."""
    if asked != "auto":
        return asked
    return "bf16" if device_type == "cuda" else "fp32"


@dataclass(frozen=True, kw_only=True)
class SaveSettings(Spec):
    """When a checkpoint is written and how many stay."""

    every: int | None = size(2**40, default=None)  # steps; none: at the end, and at each best evaluation
    keep: int = size(10_000, default=2)  # the newest; the best one stays besides
    patience: int | None = size(2**30, default=None)  # stop after so many evaluations without a better one
    tensorboard: bool = False
