"""`lathe report RUN [RUN…]`: the curves of training runs, as a page that opens anywhere and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lathe.errors import RequestError

_NAME = "report.html"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories that lathe train left.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page, FILE.html, or a directory for it; the picture stands beside it as .png. "
            "Left out: in the run's directory, or, of several runs, here. An older report is replaced.",
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="What the horizontal axis shows: steps, tokens or seconds.")] = "steps",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw loss, validation, learning rate, gradient and speed of one run, or of several over each other."""
    from lathe.cli.output import answers, emit_json, say
    from lathe.report.history import read_runs
    from lathe.report.training import AXES, write_report

    if by not in AXES:
        raise RequestError(f"--by {by}: expected one of {', '.join(AXES)}")
    histories = read_runs(runs)
    if by == "seconds":
        for run in histories:
            if not run.seconds:
                raise RequestError(f"--by seconds: {run.folder} has no times; draw it by steps or tokens")
    page = _page(runs, out)
    picture = page.with_suffix(".png")
    for note in (note for run in histories for note in run.notes):
        say(note)
    write_report(histories, page, picture, by=by)
    if as_json:
        found = [run.summary() for run in histories]
        emit_json({"page": str(page), "picture": str(picture), "runs": found})
        return
    for run in histories:
        best = run.summary()["best_evaluation"]
        held_out = f", best validation {best['loss']:.4f} at step {best['step']:,}" if best else ""
        line = f"{run.name}: step {run.steps[-1]:,}, loss {run.smoothed[-1]:.4f}{held_out}"
        answers().print(line, soft_wrap=True)
    answers().print(f"{page}, {picture}", soft_wrap=True)


def _page(runs: list[Path], out: Path | None) -> Path:
    """Where the page goes."""
    if out is None:
        return runs[0].expanduser() / _NAME if len(runs) == 1 else Path(_NAME)
    out = out.expanduser()
    if out.is_dir() or not out.suffix:
        return out / _NAME
    if out.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--out {out}: expected a file that ends in .html, or a directory")
    return out
