"""`lathe compare A B … --data FILE`: models side by side on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lathe.cli.output import Terminal, answers, emit_json
from lathe.cli.settings import parse_settings
from lathe.errors import RequestError

_KEYS = ("data", "objective")
_WIDEST = 10_000  # columns of a table in a file


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Directories or hub ids; also data.length=128, data.tokens=100000, data.field=document, "
            "objective=masked.",
        ),
    ],
    data: Annotated[str | None, typer.Option(metavar="FILE", help="The text to measure on.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write compare.html, frontier.png and compare.json there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, mps, cpu.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare loss, size and speed of any models on the same text."""
    settings = [word for word in models if word.partition("=")[1] and word.partition(".")[0].partition("=")[0] in _KEYS]
    names = [word for word in models if word not in settings]
    words: dict[str, Any] = dict(parse_settings(settings))
    if data is not None:
        if "data" in words:
            raise RequestError("data is set twice, by an option and by a word; set it once")
        words["data"] = data
    if not names:
        raise RequestError("there is nothing to compare: name a model's directory or hub id, or several")
    if not any(key.partition(".")[0] == "data" for key in words):
        raise RequestError("there is nothing to measure on: give --data FILE")
    if out is not None and out.exists() and (out.is_file() or any(out.iterdir())):
        raise RequestError(f"{out} already exists: choose another directory")
    _compare(names, words, out, device, as_json)


def _compare(names: list[str], words: dict[str, Any], out: Path | None, device: str, as_json: bool) -> None:
    from rich.table import Table

    from lathe.report.comparing import compare, table, write
    from lathe.reshape.request import read_objective, read_text

    text = read_text("data", words)
    assert text is not None
    found = compare(names, text, objective=read_objective(words), device=device, reporter=Terminal())
    if out is not None:
        write(found, out)
    if as_json:
        emit_json(found.to_dict())
        return
    header, rows = table(found)
    shown = Table(*header)
    for column in shown.columns:
        column.overflow = "fold"  # two names may differ at their ends alone
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*row)
    console = answers()
    if not console.is_terminal:  # a file has no edge
        wide = console.options.update_width(_WIDEST)
        console.width = max(console.width, console.measure(shown, options=wide).maximum)
    console.print(shown)
    if found.note:
        answers().print(found.note, soft_wrap=True)
    if out is not None:
        answers().print(f"{out}: compare.html, frontier.png and compare.json", soft_wrap=True)
