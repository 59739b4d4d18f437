"""`lathe quickstart`: train a small model, cut it, heal it, and see what each step cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lathe.cli.output import Terminal, answers, emit_json
from lathe.errors import RequestError

if TYPE_CHECKING:
    from lathe.quickstart.run import Journey

_RESULT = "quickstart.json"


def command(
    family: Annotated[str, typer.Option(help="Which kind of model: t5, gpt2, llama or albert.")] = "t5",
    out: Annotated[Path | None, typer.Option(help="Where to write; quickstart/FAMILY unless given.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers, times aside.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Train a small model on text that Python carries, cut it, heal it, and compare: five minutes, no download."""
    from lathe.checkpoint.atomic import atomic_directory
    from lathe.quickstart.report import page
    from lathe.quickstart.run import run
    from lathe.quickstart.story import story

    story(family)
    if not 0 <= seed < 2**32:
        raise RequestError(f"seed={seed}: expected 0 to {2**32 - 1}")
    folder = out or Path("quickstart") / family
    # Only what an earlier quickstart wrote is replaced.
    mine = (folder / _RESULT).is_file()
    with atomic_directory(folder, replace=mine) as made:
        journey = run(family, made, seed=seed, reporter=Terminal())
        (made / "report.html").write_text(page(journey), encoding="utf-8")
        (made / _RESULT).write_text(_text(journey), encoding="utf-8")
    if as_json:
        emit_json({**journey.to_dict(), "folder": str(folder)})
    else:
        _show(journey, folder)


def _text(journey: Journey) -> str:
    import json

    return json.dumps(journey.to_dict(), indent=2, ensure_ascii=False) + "\n"


def _show(journey: Journey, folder: Path) -> None:
    from rich.table import Table

    from lathe.quickstart.report import HEADER, cells

    console = answers()
    for example in journey.examples:
        console.print(f"\n{example.shown}\n  the text: {example.truth}")
        for name, answer in example.answers.items():
            console.print(f"  {name}: {answer}")
    table = Table(*HEADER, title=f"\n{journey.family}: {journey.facts['cut']}", title_justify="left")
    for number in range(1, len(HEADER)):
        table.columns[number].justify = "right"
    for row in cells(journey.rows):
        table.add_row(*row)
    console.print(table)
    console.print(f"{journey.seconds:.0f} seconds. The models and report.html are in {folder}.")
