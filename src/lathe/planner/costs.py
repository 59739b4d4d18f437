"""Everything that one architecture costs, gathered in one record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lathe.architecture import Architecture
from lathe.blueprint import COMPONENTS, count, stored
from lathe.planner import flops
from lathe.planner.flops import Flops
from lathe.planner.memory import (
    CacheBytes,
    InferenceMemory,
    TrainingMemory,
    cache_bytes,
    checkpoint_bytes,
    inference_memory,
    training_memory,
)

# A training step is a forward pass and a backward of twice its operations; checkpointing adds a forward.
STEP, STEP_CHECKPOINTED = 3, 4


@dataclass(frozen=True)
class Parameters:
    """How many numbers training sets.

    Attributes:
        total: unique ones; tied and shared tensors count once.
        by_component: the same by the blueprint's components. A tied head's table counts as the embedding's.
        as_executed: how many there would be if no layer shared its weights.
    """

    total: int
    by_component: dict[str, int]
    as_executed: int


@dataclass(frozen=True)
class Costs:
    """What one architecture costs.

    Attributes:
        architecture: whose costs they are.
        batch, length: the rows and tokens that memory and operations are given for.
        parameters: how many numbers training sets.
        checkpoint: bytes on disk by data type.
        cache: key-value bytes for each token.
        forward: the whole model over `length` tokens of one row (both sides of an encoder-decoder).
        prefill: what stands before the first new token.
        decode: one more token in a context of `length`; None for an encoder alone.
        training, inference: bytes in memory.
    """

    architecture: Architecture
    batch: int
    length: int
    parameters: Parameters
    checkpoint: dict[str, int]
    cache: CacheBytes
    forward: Flops
    prefill: Flops
    decode: Flops | None
    training: TrainingMemory
    inference: InferenceMemory

    def to_dict(self) -> dict[str, Any]:
        """The costs as plain JSON values."""
        kept = self.training.activations
        return {
            "architecture": self.architecture.to_dict(),
            "parameters": asdict(self.parameters),
            "checkpoint_bytes": self.checkpoint,
            "cache_bytes": asdict(self.cache),
            "flops": {
                "length": self.length,
                "forward": _passed(self.forward),
                "prefill": _passed(self.prefill),
                "decode": None if self.decode is None else _passed(self.decode),
                "training_step": STEP * self.batch * self.forward.total,
                "training_step_checkpointed": STEP_CHECKPOINTED * self.batch * self.forward.total,
            },
            "memory": {
                "batch": self.batch,
                "length": self.length,
                "training": {
                    "weights": self.training.weights,
                    "gradients": self.training.gradients,
                    "optimizer": self.training.optimizer,
                    "activations": kept.total,
                    "activations_checkpointed": kept.checkpointed,
                    "activations_by_component": kept.by_component,
                    "attention_weights": kept.attention_weights,
                    "total": self.training.total,
                    "total_checkpointed": self.training.total_checkpointed,
                },
                "inference": {**asdict(self.inference), "total": self.inference.total},
            },
        }


def _passed(counted: Flops) -> dict[str, Any]:
    return {
        "tokens": counted.tokens,
        "total": counted.total,
        "per_token": counted.per_token,
        "by_component": counted.by_component,
    }


def costs(architecture: Architecture, batch: int, length: int, optimizer: str = "adamw") -> Costs:
    """What `architecture` costs, with `batch` rows of `length` tokens where that matters."""
    return Costs(
        architecture=architecture,
        batch=batch,
        length=length,
        parameters=parameters(architecture),
        checkpoint=checkpoint_bytes(architecture),
        cache=cache_bytes(architecture),
        forward=flops.forward(architecture, length),
        prefill=flops.prefill(architecture, length),
        decode=flops.decode(architecture, length),
        training=training_memory(architecture, batch, length, optimizer),
        inference=inference_memory(architecture, batch, length),
    )


def parameters(architecture: Architecture) -> Parameters:
    """The parameters of `architecture`, counted over its blueprint."""
    by_component = dict.fromkeys(COMPONENTS, 0)
    for parameter in stored(architecture):
        if parameter.trained:
            by_component[parameter.component] += parameter.size
    shared = any(
        stack.n_attentions < stack.n_layers or stack.n_feed_forwards < stack.n_layers
        for _, stack in architecture.stacks
    )
    total = sum(by_component.values())
    return Parameters(total, by_component, count(architecture.with_(sharing="none")) if shared else total)
