"""`lathe evaluate MODEL --data FILE [key=value …]`: how good a model is on text it has not seen."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lathe.cli.settings import parse_settings
from lathe.errors import RequestError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or a hub id.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="objective=masked, data.length=256, data.rows=32, data.fields.text=document, precision=bf16 …",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="What to evaluate on: a file, or a dataset's name.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, mps, cpu; device=NAME.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss, perplexity, bits per byte; accuracy and F1 of a classifier."""
    words: dict[str, Any] = dict(parse_settings(settings or []))
    if data is None and not any(key == "data" or key.startswith("data.t") for key in words):
        raise RequestError("there is nothing to evaluate on: give --data FILE")
    if data is not None:
        words["data"] = data
    if device is not None:
        words["device"] = device
    words["model"] = model
    from lathe.cli.output import answers, emit_json
    from lathe.train.measure import measure
    from lathe.train.request import read_evaluation

    found = measure(read_evaluation(words))
    if as_json:
        emit_json({"model": model, **found})
        return
    for name, value in found.items():
        written = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        answers().print(f"{name.replace('_', ' ')}: {written}", soft_wrap=True)
