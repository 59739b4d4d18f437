"""A page and a picture of training runs: loss, validation, learning rate, gradient, speed; what was asked.

One run is drawn with its raw losses behind the smoothed ones, and its best and last checkpoints marked. Several are
laid over each other, with the settings in which they differ in a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lathe.checkpoint.atomic import atomic_file
from lathe.report.history import History
from lathe.report.html import Page
from lathe.report.plots import Line, Mark, Panel, panel, write_png

# What the horizontal axis may show: the label, and the value at each step that has one.
AXES: dict[str, tuple[str, Callable[[History], Sequence[float]]]] = {
    "steps": ("step", lambda run: run.steps),
    "tokens": ("tokens", lambda run: run.tokens),
    "seconds": ("seconds of training", lambda run: run.seconds),
}
_SUMMARY = ("run", "steps", "tokens", "time", "tokens/s", "loss", "validation", "best validation", "at step")


def write_report(runs: Sequence[History], page: Path, picture: Path, *, by: str = "steps") -> None:
    """Write the page and the picture, each whole or not at all; what stood there is replaced.

    Args:
        by: what the horizontal axis shows, a key of `AXES`.
    """
    panels = _panels(runs, by)
    with atomic_file(picture, replace=True) as path:
        write_png(panels, path, of=[run.name for run in runs])
    with atomic_file(page, replace=True) as path:
        path.write_text(_page(runs, panels), encoding="utf-8")


def _panels(runs: Sequence[History], by: str) -> list[Panel]:
    """The loss first; then validation of several runs, learning rate, gradient and speed."""
    label, values = AXES[by]
    xs = [values(run) for run in runs]
    made = [_loss(runs, xs, label)]
    if len(runs) > 1 and any(run.evaluations for run in runs):
        made.append(_validation(runs, xs, label))
    names = [run.name if len(runs) > 1 else None for run in runs]
    rates, gradients, speeds = [], [], []
    for number, (run, x) in enumerate(zip(runs, xs, strict=True)):
        rates.append(Line(x, run.rates[: len(x)], names[number], number))
        gradients.append(Line(x, run.gradients[: len(x)], names[number], number, "thin"))
        measured = run.speeds()
        speeds.append(Line([x[at] for at, _ in measured], [each for _, each in measured], names[number], number))
    made.append(Panel("Learning rate", label, "learning rate", rates, zero=True))
    made.append(Panel("Gradient norm, before clipping", label, "norm (log)", gradients, log=True))
    if any(line.xs for line in speeds):
        made.append(Panel("Speed", label, "tokens a second", speeds, zero=True))
    return made


def _loss(runs: Sequence[History], xs: Sequence[Sequence[float]], label: str) -> Panel:
    """Training loss, raw and smoothed; of one run the validation with it, and its checkpoints."""
    lines, marks = [], []
    for number, (run, x) in enumerate(zip(runs, xs, strict=True)):
        losses, smoothed = run.losses[: len(x)], run.smoothed[: len(x)]
        lines.append(Line(x, losses, "each step" if len(runs) == 1 else None, number, "faint"))
        lines.append(Line(x, smoothed, "smoothed" if len(runs) == 1 else run.name, number))
        evaluations = [(at, loss) for at, loss in run.evaluations if at < len(x)]
        if len(runs) == 1 and evaluations:
            points = [x[at] for at, _ in evaluations], [loss for _, loss in evaluations]
            lines.append(Line(*points, "validation", 1, "points"))
        heights = dict(evaluations) if len(runs) == 1 else {}
        for name, step, shape in _checkpoints(run):
            at = _index(run, step)
            if at is not None and at < len(x):
                colour = number if len(runs) > 1 or at not in heights else 1
                marks.append(Mark(x[at], heights.get(at, smoothed[at]), name, colour, shape))
    return Panel("Loss", label, "nats a target", lines, marks)


def _checkpoints(run: History) -> list[tuple[str, int | None, str]]:
    """The label, the step and the sign of the checkpoints that are marked."""
    if run.best == run.last:
        return [("best and last checkpoint", run.best, "*")]
    return [("last checkpoint", run.last, "D"), ("best checkpoint", run.best, "*")]


def _validation(runs: Sequence[History], xs: Sequence[Sequence[float]], label: str) -> Panel:
    lines, marks = [], []
    for number, (run, x) in enumerate(zip(runs, xs, strict=True)):
        evaluations = [(at, loss) for at, loss in run.evaluations if at < len(x)]
        lines.append(
            Line([x[at] for at, _ in evaluations], [loss for _, loss in evaluations], run.name, number, "points")
        )
        best = _index(run, run.best)
        marks += [Mark(x[at], loss, "best checkpoint", number) for at, loss in evaluations if at == best]
    return Panel("Validation loss", label, "nats a target", lines, marks)


def _index(run: History, step: int | None) -> int | None:
    """Where a step stands in the run's lists."""
    return run.steps.index(step) if step in run.steps else None


def _page(runs: Sequence[History], panels: Sequence[Panel]) -> str:
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    made = Page(title, ", ".join(str(run.folder) for run in runs))
    made.table(_SUMMARY, [_row(run) for run in runs])
    for note in (note for run in runs for note in run.notes):
        made.text(note)
    for each in panels:
        made.heading(each.title)
        made.picture(panel(each), _CAPTIONS.get(each.title, ""))
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    differing = [key for key in keys if len({_setting(run, key) for run in runs}) > 1]
    if differing:
        made.heading("In what the runs differ")
        made.table(("setting", *(run.name for run in runs)), _settings(runs, differing), left=True)
    same = [key for key in keys if key not in differing]
    if same:
        made.heading("Settings" if len(runs) == 1 else "Settings that all have")
        made.table(("setting", "value"), _settings(runs[:1], same), left=True)
    return made.render()


_CAPTIONS = {
    "Loss": "Pale: each step. Strong: the mean of a fiftieth of the run around it. A diamond marks the last "
    "checkpoint, a star the one with the lowest validation loss.",
    "Validation loss": "On text that is not trained on, the same text each time.",
    "Speed": "Over stretches of a fiftieth of the run. Only the steps count, not evaluations and saves.",
}


def _settings(runs: Sequence[History], keys: Sequence[str]) -> list[tuple[str, ...]]:
    return [(key, *(_setting(run, key) for run in runs)) for key in keys]


def _setting(run: History, key: str) -> str:
    """A setting as it is written; a dash where the run was not asked it."""
    value: Any = run.settings.get(key, "–")
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _row(run: History) -> tuple[str, ...]:
    found = run.summary()
    evaluations, best = found["evaluations"], found["best_evaluation"]
    speed = found["tokens_per_second"]
    return (
        run.name,
        f"{found['steps']:,}",
        f"{found['tokens']:,}",
        "–" if found["seconds"] is None else _time(found["seconds"]),
        "–" if speed is None else f"{speed:,.0f}",
        f"{found['smoothed_loss']:.4f}",
        f"{evaluations[-1]['loss']:.4f}" if evaluations else "–",
        f"{best['loss']:.4f}" if best else "–",
        f"{best['step']:,}" if best else "–",
    )


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
