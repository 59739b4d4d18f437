"""What a training run wrote down, read back: its steps, its times, its settings, and where its checkpoints stand.

A run that is killed while it writes leaves half a line at the end of a file, and so does one that is just writing.
That line is left out, with a note. A line that cannot be read anywhere else is an error that names it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from lathe.errors import LatheError, RequestError
from lathe.report.labels import told_apart

METRICS, SPEED, RUN = "metrics.jsonl", "speed.jsonl", "run.json"
_NUMBERS = ("step", "loss", "lr", "gradient_norm", "tokens")
# The share of a run over which the loss is smoothed and the speed is taken.
_WINDOW = 0.02


@dataclass(frozen=True)
class History:
    """One run. The lists have an entry for each step, but for `evaluations`, which are (index of the step, loss).

    Args:
        steps, losses, rates, gradients, tokens: as `metrics.jsonl` holds them; tokens are counted from the start.
        seconds: of training up to each step; shorter where the file of times is.
        settings: everything that the run was asked, flat (`optimizer.lr`); empty where `run.json` is missing.
        best, last: the steps of these checkpoints, where there are any.
        notes: what was left out, a line each.
    """

    name: str
    folder: Path
    steps: list[int]
    losses: list[float]
    rates: list[float]
    gradients: list[float]
    tokens: list[int]
    seconds: list[float]
    evaluations: list[tuple[int, float]]
    settings: Mapping[str, Any]
    best: int | None
    last: int | None
    notes: tuple[str, ...]

    @property
    def smoothed(self) -> list[float]:
        """The losses, each as the mean of a fiftieth of the run around it; at the ends, of what there is of that."""
        return smooth(self.losses, round(len(self.losses) * _WINDOW / 2))

    def speeds(self) -> list[tuple[int, float]]:
        """(index of a step, tokens a second over the stretch that ends there)."""
        n = len(self.seconds)
        stretch = max(1, round(n * _WINDOW))
        found = []
        for end in range(stretch, n, stretch):
            seconds = self.seconds[end] - self.seconds[end - stretch]
            if seconds > 0:
                found.append((end, (self.tokens[end] - self.tokens[end - stretch]) / seconds))
        return found

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers, as plain JSON values."""
        best = min(self.evaluations, key=lambda each: each[1], default=None)
        # The first step is the machine's slowest, and no tokens are known before it.
        seconds = self.seconds[-1] - self.seconds[0] if self.seconds else 0.0
        tokens = self.tokens[len(self.seconds) - 1] - self.tokens[0] if self.seconds else 0
        return {
            "run": str(self.folder),
            "name": self.name,
            "steps": self.steps[-1],
            "tokens": self.tokens[-1],
            "seconds": self.seconds[-1] if self.seconds else None,
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
            "loss": self.losses[-1],
            "smoothed_loss": self.smoothed[-1],
            "evaluations": [{"step": self.steps[at], "loss": loss} for at, loss in self.evaluations],
            "best_evaluation": None if best is None else {"step": self.steps[best[0]], "loss": best[1]},
            "best_checkpoint": self.best,
            "last_checkpoint": self.last,
            "notes": list(self.notes),
        }


def read_runs(folders: Sequence[Path]) -> list[History]:
    """The histories of runs, each under the shortest end of its path that no other has.

    Raises:
        RequestError: a folder that holds no run, one that has made no step, or the same one twice.
        LatheError: a damaged file.
    """
    places = [Path(os.path.normpath(folder.expanduser().absolute())) for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise RequestError(f"{folders[number]} is named twice; name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, told_apart(places), strict=True)]


def read_run(folder: Path, name: str | None = None) -> History:
    """One run's history; see `read_runs`."""
    folder = folder.expanduser()
    if not (folder / METRICS).is_file():
        what = "holds no" if folder.is_dir() else "is no directory with a"
        raise RequestError(f"{folder} {what} {METRICS}: expected a run's directory, as lathe train leaves it")
    lines, torn = _lines(folder / METRICS, _NUMBERS)
    if not lines:
        raise RequestError(f"{folder / METRICS} holds no whole step yet: nothing to draw; wait for the first")
    notes = [torn] if torn else []
    seconds: list[float] = []
    if (folder / SPEED).is_file():
        times, torn = _lines(folder / SPEED, ("step", "seconds"))
        notes += [torn] if torn else []
        seconds = [each["seconds"] for each in times][: len(lines)]
    else:
        notes.append(f"{folder / SPEED} is missing: no times and no tokens a second")
    return History(
        name=name or folder.name,
        folder=folder,
        steps=[each["step"] for each in lines],
        losses=[each["loss"] for each in lines],
        rates=[each["lr"] for each in lines],
        gradients=[each["gradient_norm"] for each in lines],
        tokens=[each["tokens"] for each in lines],
        seconds=seconds,
        evaluations=[(at, each["evaluation"]["loss"]) for at, each in enumerate(lines) if "evaluation" in each],
        settings=_settings(folder / RUN, notes),
        best=_step(folder / "checkpoints" / "best"),
        last=_step(folder / "checkpoints" / "last"),
        notes=tuple(notes),
    )


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value, `reach` values before it and as many after it, as far as there are any."""
    sums = [0.0, *accumulate(values)]
    n = len(values)
    bounds = ((max(0, at - reach), min(n, at + reach + 1)) for at in range(n))
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]


def _lines(path: Path, numbers: Sequence[str]) -> tuple[list[dict[str, Any]], str | None]:
    """The file's records, and a note where the last one was torn."""
    rows = path.read_bytes().split(b"\n")
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows[:-1], start=1):
        try:
            record = json.loads(row)
        except ValueError:
            record = None
        if not _is_record(record, numbers):
            raise LatheError(
                f"{path}, line {number} is damaged: expected an object with {', '.join(numbers)}; "
                "resuming the run cuts the file back to its last checkpoint"
            )
        found.append(record)
    torn = f"{path}, line {len(rows)} ends early and is left out: the run was killed there, or is writing it"
    return found, torn if rows[-1] else None


def _is_record(record: Any, numbers: Sequence[str]) -> bool:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    if not isinstance(record, dict) or not all(number(record.get(name)) for name in numbers):
        return False
    evaluation = record.get("evaluation", {"loss": 0.0})
    return isinstance(evaluation, dict) and number(evaluation.get("loss"))


def _settings(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"{path} is missing: the settings are not known")
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LatheError(f"{path} is not JSON ({error}); it should hold what the run was asked") from None
    return _flat(tree, "")


def _flat(tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


def _step(link: Path) -> int | None:
    """The step of the checkpoint that a link points at."""
    match = re.fullmatch(r"step-([0-9]+)", link.resolve().name) if link.is_symlink() else None
    return int(match[1]) if match else None
