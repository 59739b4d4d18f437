"""The measuring: in each round every contestant takes its turn at every task, and another one begins each time.

A task is a call that all of them know: so many rows, a prompt of so many tokens, so many new ones. Reading the
prompt and decoding are told apart from outside, in the same way for everyone: the call that asks for one token has
read the prompt, and what a longer call takes beyond that is the other tokens. A turn warms up first, since the
cache of the processor holds another's weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.generation.base import Unfit
from benchmarks.generation.pool import Broken, Worker
from benchmarks.generation.shapes import Shape

SEED = 11


@dataclass(frozen=True)
class Task:
    """One thing to measure: `decode` (tokens after a prompt), `prefill` (the prompt, one token), or `encode`."""

    what: str
    batch: int
    length: int
    new: int = 1

    @property
    def name(self) -> str:
        """As figures are kept under it."""
        return f"{self.what}-{self.batch}"


@dataclass(frozen=True)
class Sizes:
    """How much of each task."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 32
    new: int = 128
    prefill: int = 256
    encode: int = 128

    def tasks(self, kind: str) -> list[Task]:
        """What a model of this kind is measured at."""
        if kind == "encoder":
            return [Task("encode", batch, self.encode) for batch in self.batches]
        decoding = [Task("decode", batch, self.prompt, self.new) for batch in self.batches]
        return [*decoding, Task("prefill", 1, self.prefill)]


@dataclass
class Figures:
    """What was found of one contestant, or why it has no row of figures."""

    name: str
    bits: int
    ours: bool
    version: str = ""
    reason: str = ""
    broken: bool = False  # and not merely unfit
    rounds: dict[str, list[float]] = field(default_factory=dict)  # tokens a second by task, a number a round
    medians: dict[str, float] = field(default_factory=dict)
    step_bytes: float = 0.0  # of weights that a step of decoding reads
    share: float | None = None  # of the bandwidth limit, decoding one row
    errors: dict[str, float] = field(default_factory=dict)
    first_token: dict[str, float] = field(default_factory=dict)  # seconds: cold, warm
    peak_bytes: dict[str, int] = field(default_factory=dict)  # first token, whole run

    def gave_up(self, reason: Unfit | Broken) -> None:
        """It takes no further part, and its row says why."""
        self.reason, self.broken = str(reason), isinstance(reason, Broken)


def measure(
    shape: Shape,
    workers: dict[str, Worker],
    found: dict[str, Figures],
    sizes: Sizes,
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Fill in the figures of every contestant that has a worker; one that breaks keeps its reason instead."""
    for number in range(rounds):
        for task in sizes.tasks(shape.kind):
            for name in _turns(list(workers), number):
                if found[name].reason:
                    continue
                try:
                    rate = _turn(workers[name], shape, task, number == 0)
                except (Unfit, Broken) as reason:
                    found[name].gave_up(reason)
                    say(f"{shape.name}: {name}: {reason}")
                    continue
                found[name].rounds.setdefault(task.name, []).append(rate)
                say(f"{shape.name}: round {number + 1}: {task.name}: {name}: {rate:,.0f} tokens/s")
    for each in found.values():
        each.medians = {name: statistics.median(rates) for name, rates in each.rounds.items()}


def _turns(names: list[str], number: int) -> Iterator[str]:
    start = number % max(len(names), 1)
    yield from names[start:] + names[:start]


def _turn(worker: Worker, shape: Shape, task: Task, first_time: bool) -> float:
    """Tokens a second."""
    rows = shape.prompts(task.batch, task.length, SEED)
    if task.what == "encode":
        worker.ask("encode", rows=rows)
        return task.batch * task.length / _seconds(worker.ask("encode", rows=rows))
    if task.what == "prefill":
        worker.ask("generate", prompts=rows, new=1)
        return task.batch * task.length / _seconds(worker.ask("generate", prompts=rows, new=1))
    # The first time the warm-up is as long as the call that counts: a compiled step can be for one length only.
    worker.ask("generate", prompts=rows, new=task.new if first_time else min(task.new, 16))
    # The quickest of three: a first token that was slow by chance would make the others look quick.
    first = _seconds(worker.ask("generate", prompts=rows, new=1, repeats=3))
    whole = _seconds(worker.ask("generate", prompts=rows, new=task.new))
    return task.batch * (task.new - 1) / max(whole - first, 1e-9)


def _seconds(answer: dict[str, Any]) -> float:
    return float(min(answer["seconds"]))
