"""`lathe look MODEL --text TEXT`: one sentence's way through a model, number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lathe.errors import RequestError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or a hub id.")],
    text: Annotated[str, typer.Option("--text", help="The sentence.")],
    target: Annotated[
        str | None, typer.Option(help="What a decoder beside an encoder reads; left out: what the model writes.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Whose attention to show; 1 is the first.")] = 1,
    head: Annotated[int | None, typer.Option(help="Which head of it; left out: the mean of all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw every head's attention into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, all heads in it.")] = False,
) -> None:
    """Show pieces, ids, mask, vector lengths, q·k scores, attention weights and the module tree."""
    import lathe
    from lathe.cli.output import emit_json, say, write
    from lathe.report.look import lines, look, write_png

    if out is not None and out.suffix != ".png":
        raise RequestError(f"--out {out}: expected a name that ends in .png")
    opened = lathe.load(model)
    if opened.tokenizer is None:
        raise RequestError(f"{model} has no tokenizer; put its tokenizer's files beside its weights")
    found = look(opened, opened.tokenizer, text, target=target, layer=layer)
    shown = list(lines(found, head))
    if out is not None:
        unwritten = write_png(found, out.expanduser())
        say(f"drew {out}" + (f"; {_without_a_font(unwritten)}" if unwritten else ""))
    if as_json:
        emit_json(found)
        return
    for line in shown:
        write(line)


def _without_a_font(pieces: list[str]) -> str:
    shown = ", ".join(pieces[:4]) + (" …" if len(pieces) > 4 else "")
    return f"no font here writes {shown}, so their places stand there as ·0·; install one that does (Noto Sans CJK)"
