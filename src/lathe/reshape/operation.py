"""What one operation is, and what it is given: the seam between `resize` and the files that do the work.

A planner looks at the sizes that there are and the sizes that are wanted, and answers with operations; each names
the fields that it settles. `resize` asks the planners in order and then runs what they answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from lathe.architecture import Architecture
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.state import State, Step
from lathe.reshape.stream import model_of
from lathe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lathe.reshape.vocabulary import Renewed


@dataclass
class Context:
    """What operations share.

    Args:
        model: the model before the first operation.
        start: its state.
        batches: the calibration text.
        generator: where weights that growth draws come from; seeded, so that a resize can be repeated. The labels that
            a basis is looked for by are drawn by another one with its seed.
        tokenizer: the model's, where it has one. The operation that numbers the tokens anew replaces it; it is the
            last, since `batches` hold the old numbers.
        vocabulary: the one that was settled, where it changes.
    """

    model: Transformer
    start: State
    batches: Sequence[Batch]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    tokenizer: Tokenizer | None = None
    vocabulary: Renewed | None = None

    def current(self, state: State) -> Transformer:
        """A model of the state as it is now, for statistics on the text."""
        if state is self.start:
            return self.model
        return model_of(state, self.model.dtype, self.model.device)


Run = Callable[[Context, State], tuple[State, list[Step]]]


@dataclass(frozen=True)
class Operation:
    """One change: the fields that it settles, and how."""

    changes: Mapping[str, Any]
    run: Run


# Given what the model will be by then and what is wanted in the end.
Planner = Callable[[Architecture, Architecture], list[Operation]]


def by_stack(
    done: Architecture, target: Architecture, number: str, run: Callable[[str, int], Run], *, grows: bool
) -> list[Operation]:
    """An operation for each stack in which a number becomes smaller, or larger where `grows`.

    Args:
        number: a field of a stack, such as `feed_forward.d_ff`.
        run: what is done, from the stack's name and the number that is wanted.
    """
    size, operations = attrgetter(number), list[Operation]()
    for name, stack in done.stacks:
        old, wanted = size(stack), size(dict(target.stacks)[name])
        if wanted > old if grows else wanted < old:
            operations.append(Operation({f"{name}.{number}": wanted}, run(name, wanted)))
    return operations


Act = Callable[..., tuple[State, Step]]


def plain(function: Act, *arguments: Any) -> Run:
    """A run of `function(state, *arguments)`, which needs nothing else."""

    def run(_: Context, state: State) -> tuple[State, list[Step]]:
        state, step = function(state, *arguments)
        return state, [step]

    return run


def drawing(function: Act, *arguments: Any) -> Run:
    """A run of `function(state, *arguments, generator=…)`, which draws new weights."""

    def run(context: Context, state: State) -> tuple[State, list[Step]]:
        state, step = function(state, *arguments, generator=context.generator)
        return state, [step]

    return run


def measured(function: Act, *arguments: Any) -> Run:
    """A run of `function(model, batches, state, *arguments)`, which looks at the text; `model` is that of `state`."""

    def run(context: Context, state: State) -> tuple[State, list[Step]]:
        state, step = function(context.current(state), context.batches, state, *arguments)
        return state, [step]

    return run
