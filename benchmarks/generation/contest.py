"""One shape from its weights to everybody's figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.generation.base import Unfit
from benchmarks.generation.checks import Agreement, errors, same_tokens
from benchmarks.generation.pool import Broken, Worker
from benchmarks.generation.rounds import Figures, Sizes, measure
from benchmarks.generation.rows import Row
from benchmarks.generation.shapes import Shape
from benchmarks.generation.startup import first_tokens


@dataclass(frozen=True)
class Setting:
    """What holds for every shape.

    Args:
        rows: who takes part.
        sizes: how much of each task.
        rounds: how often everyone takes their turn.
        threads: for each contestant.
        startup: whether new processes are measured as well.
        openvino: the interpreter of its environment; None for this one.
        say: told of progress.
    """

    rows: list[Row]
    sizes: Sizes
    rounds: int
    threads: int
    startup: bool
    openvino: str | None
    say: Callable[[str], None]

    def worker(self, row: Row, shape: Shape, model: Path, folder: Path, caches: Path | None = None) -> Worker:
        """A contestant's process, with a folder of its own in `folder`."""
        python = self.openvino if row.module == "openvino" and self.openvino else sys.executable
        return Worker(row, shape.kind, model, folder / row.key, self.threads, python, caches)


@dataclass(frozen=True)
class Result:
    """One shape's figures, and whether the float32 contestants agreed."""

    shape: Shape
    found: dict[str, Figures]
    agreement: Agreement | None

    @property
    def failed(self) -> bool:
        """Whether one of Lathe's rows broke, or gave other tokens than the reference in float32."""
        differ = self.agreement.different if self.agreement else {}
        return any(each.ours and (each.broken or each.name in differ) for each in self.found.values())


def contest(shape: Shape, setting: Setting, work: Path) -> Result:
    """Prepare, check, measure, and start anew; models and conversions stay in `work`."""
    folder = work / shape.name
    model = shape.build(folder / "model")
    found = {row.name: Figures(row.name, row.bits, row.ours) for row in setting.rows}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for row in setting.rows:
            try:
                # In a process of its own: what a conversion leaves in memory is not the runtime's.
                with setting.worker(row, shape, model, folder) as once:
                    found[row.name].version = once.ask("prepare")["version"]
            except (Unfit, Broken) as reason:
                found[row.name].gave_up(reason)
                setting.say(f"{shape.name}: {row.name}: {reason}")
            else:
                workers[row.name] = stack.enter_context(setting.worker(row, shape, model, folder))
        agreement = same_tokens(shape, workers, found, setting.sizes)
        if agreement is not None:
            setting.say(f"{shape.name}: {agreement.line()}")
        errors(shape, workers, found, setting.sizes, folder)
        measure(shape, workers, found, setting.sizes, setting.rounds, setting.say)
        for name, worker in workers.items():
            if not found[name].reason:
                found[name].peak_bytes["whole run"] = worker.ask("memory")["peak"]
                found[name].step_bytes = worker.ask("step_bytes")["step_bytes"] or worker.row.read_a_step(shape)
    for row in setting.rows if setting.startup else ():
        if not found[row.name].reason:
            start = partial(setting.worker, row, shape, model, folder)
            try:
                first_tokens(start, shape, folder / row.key, setting.sizes, found[row.name])
            except Broken as reason:  # what was measured before stays
                found[row.name].broken = True
                setting.say(f"{shape.name}: {row.name}: {reason}")
            else:
                setting.say(f"{shape.name}: {row.name}: first token {found[row.name].first_token}")
    return Result(shape, found, agreement)
