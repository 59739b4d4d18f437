"""`lathe plan MODEL [field=value …]`: what a model costs, and what it would cost with other sizes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.errors import RequestError

if TYPE_CHECKING:
    from lathe.architecture import Architecture


def command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset, a model's directory, a hub id (owner/name), or an architecture's JSON file.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Sizes to change: d_model=512, encoder.n_layers=4, sharing=all. "
            "head=masked picks another head of a preset.",
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="The training corpus: 40M, 1.2B. Judges over-fitting.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch, for memory.")] = 8,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; 512, or as many as the model can read.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, momentum or sgd, for memory.")] = "adamw",
    flops_per_second: Annotated[
        str | None, typer.Option(help="A speed that you measured or assume, as 100G; adds times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show parameters, bytes, operations and memory of a model, before and after a change, without its weights."""
    from lathe.cli.output import emit_json, write
    from lathe.cli.settings import parse_settings
    from lathe.planner import plan
    from lathe.planner.quantities import typed
    from lathe.planner.text import render

    changes: dict[str, Any] = dict(parse_settings(settings or []))
    # A preset's head is chosen by name; it is where the plan starts from, not a change.
    head = {"head": changes.pop("head")} if isinstance(changes.get("head"), str) else {}
    found = plan(
        _architecture(model, head.get("head")),
        changes,
        tokens=tokens,
        batch=batch,
        length=length,
        optimizer=optimizer,
        flops_per_second=flops_per_second,
    )
    if as_json:
        emit_json({"model": model, **found.to_dict()})
        return
    write(f"{model}\n{render(found)}")
    if found.proposal:
        words = [f"{name}={typed(value)}" for name, value in {**head, **changes, **found.proposal}.items()]
        write(f"\n{shlex.join(['lathe', 'plan', model, *words, *_options(context)])}")


def _options(context: typer.Context) -> list[str]:
    """The options that were given, as they are typed."""
    words: list[str] = []
    for name in ("tokens", "batch", "length", "optimizer", "flops_per_second"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            words += [f"--{name.replace('_', '-')}", str(context.params[name])]
    return words


def _architecture(model: str, head: str | None) -> Architecture:
    """The architecture that MODEL names, a preset with the head of that name."""
    from lathe.architecture import Architecture
    from lathe.presets import names, preset

    path = Path(model).expanduser()
    if model in names():
        return preset(model, head)
    if head is not None:
        raise RequestError(f"head={head}: only a preset has heads to choose from, and {model!r} is none")
    if path.is_file():
        return Architecture.from_json(_text(path))
    if path.is_dir() or "/" in model:
        from lathe.checkpoint.load import read_architecture

        return read_architecture(model)
    try:
        return preset(model)
    except RequestError as error:
        raise RequestError(f"{error} Or give a directory, or a hub id as owner/name") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 (byte {error.start}): expected an architecture as JSON") from None
