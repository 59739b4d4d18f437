"""`lathe resize SRC DST field=value …`: another size for a trained model, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.cli.destination import require_free
from lathe.cli.output import Terminal, answers, emit_json
from lathe.cli.settings import parse_settings
from lathe.errors import RequestError

if TYPE_CHECKING:
    from lathe.reshape.job import Job
    from lathe.reshape.outcome import Outcome


_FIELD = re.compile(r"[a-z_][a-z_.]*=")


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model's directory, or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Where the new model goes.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="d_model=384, d_ff=1024, n_layers=4, n_heads=6, d_embed=128 …; also calibrate.tokens=100000, "
            "calibrate.field=document, data.tokens=50000, heal.steps=500, heal.lr=5e-3, objective=masked, "
            "refit=false, stream=true, budget.effort=3, seed=1. Tokens: vocab_size=8000, vocabulary=FILE (keep what "
            "this text uses, or learn new pieces from it), words=[one,two], multiple_of=64. Layers: sharing=all, "
            "share=middle, remainder=8 (what they differ by, in an adapter in DST/remainder).",
        ),
    ] = None,
    calibrate: Annotated[str | None, typer.Option(metavar="FILE", help="Text that the cut is fitted on.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to measure on; else a tenth of the calibration text.")
    ] = None,
    heal: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to heal on, with the source as teacher.")
    ] = None,
    max_parameters: Annotated[
        str | None, typer.Option(metavar="N", help="A budget in place of sizes: cut where it costs least, as 30M.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="N", help="The same for the checkpoint's bytes in its type, as 40MB.")
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option(metavar="MS", help="The same for one token (an encoder: one row), timed here.")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Show a budget's plan and write nothing.")] = False,
    method: Annotated[str | None, typer.Option(help="How a width is cut: rotate, select or truncate.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Do again what this lathe.json says, to the same bytes.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the healing's run here; else DST.heal until it is done.")
    ] = None,
    own_form: Annotated[
        bool, typer.Option("--own-form", help="Write Lathe's own form where no stock file can hold the sizes.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to heal and measure: auto, cuda, mps, cpu.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Change the sizes of a trained model, heal it, and report what each step cost."""
    words: dict[str, Any] = dict(parse_settings(settings or []))
    options = {"calibrate": calibrate, "data": data, "heal": heal, "method": method}
    limits = {"max_parameters": max_parameters, "max_bytes": max_bytes, "max_latency": max_latency}
    for name, value in {**options, **limits}.items():
        if value is not None and name in words:
            raise RequestError(f"{name} is set twice, by an option and by a word; set it once")
        if value is not None:
            words[name] = value
    _resize(source, destination, words, recipe, run, own_form, device, plan_only, as_json)


def _resize(
    source: str,
    destination: Path,
    words: dict[str, Any],
    recipe: Path | None,
    run: Path | None,
    own_form: bool,
    device: str,
    plan_only: bool,
    as_json: bool,
) -> None:
    from lathe.report.resizing import pages
    from lathe.reshape.opening import open_job
    from lathe.reshape.request import read_request
    from lathe.reshape.run import run_job

    if _FIELD.match(destination.name) and not destination.exists():
        raise RequestError(f"{destination} is a change, where DST is expected: lathe resize SRC DST {destination}")
    require_free(destination)
    if recipe is not None:
        job = _replay(source, words, recipe, device)
    else:
        job = open_job(read_request(source, words, own_form=own_form, device=device))
    if run is not None and job.request.heal is None:
        raise RequestError("--run keeps the healing's run, and nothing heals here: leave it out, or give --heal FILE")
    if plan_only and job.request.budget is None:
        raise RequestError("--plan-only shows a budget's plan: give --max-parameters, --max-bytes or --max-latency")
    if job.request.budget is not None:
        from lathe.reshape.budget_job import spend
        from lathe.reshape.run import heal_folder

        heals = job.request.heal is not None and not plan_only
        kept = (run or heal_folder(destination)) if heals else None
        job, _ = spend(job, Terminal().say, beside=destination, kept=kept)
    if plan_only:
        assert job.budget is not None
        _show_plan(job.budget, as_json)
        return
    if job.budget is not None and not as_json:
        _show_plan(job.budget, as_json=False)
    outcome = run_job(job, destination, pages=pages, run=run, reporter=Terminal())
    if as_json:
        budget = {} if job.budget is None else {"budget": dict(job.budget)}
        emit_json({"directory": str(destination), **outcome.to_dict(), **budget})
    else:
        _show(outcome, destination)


def _replay(source: str, words: dict[str, Any], recipe: Path, device: str) -> Job:
    """The job of a recipe; only where the texts are may be said anew."""
    from lathe.reshape.opening import open_replay
    from lathe.reshape.recipe import read_recipe
    from lathe.reshape.request import read_text

    again = ("calibrate", "vocabulary", "heal", "stream")
    known = [name for name in words if name.partition(".")[0] == "data" or name in again]
    if len(known) < len(words):
        odd = next(name for name in words if name not in known)
        raise RequestError(f"{odd}={words[odd]}: the recipe says what is done; leave it out, or leave out --recipe")
    data = read_text("data", words)
    return open_replay(
        read_recipe(recipe),
        source,
        calibrate=words.get("calibrate"),
        vocabulary=words.get("vocabulary"),
        heal=words.get("heal"),
        data=data,
        device=device,
        stream=words.get("stream"),
    )


def _show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """A budget's plan: the axes, the single ones that would meet it too, and where the numbers come from."""
    if as_json:
        emit_json({"budget": dict(plan)})
        return
    from lathe.reshape.budget_table import text

    answers().print(text(plan), soft_wrap=True)


def _show(outcome: Outcome, destination: Path) -> None:
    from rich.table import Table

    from lathe.report.resizing import reload_lines, size_table, step_cells, step_notes

    console = answers()
    for name, kind, moved, _, loss, difference in step_cells(outcome):
        cost = "" if loss == "–" else f", loss {loss} ({difference})"
        console.print(f"{name} ({kind}): logits moved {moved}{cost}", soft_wrap=True)
    for line in step_notes(outcome):
        console.print(line, soft_wrap=True)
    table = Table("", "source", "result")
    for number in (1, 2):
        table.columns[number].justify = "right"
    header, rows = size_table(outcome)
    for row in zip(header, *rows):
        table.add_row(*row)
    console.print(table)
    for line in reload_lines(outcome):
        console.print(line, soft_wrap=True)
    console.print(f"{destination}: the model, its recipe (lathe.json), report.html and README.md", soft_wrap=True)
