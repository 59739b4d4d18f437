"""`lathe classify MODEL --file TEXTS`: the label of each line of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A classifier's directory, or a hub id.")],
    file: Annotated[Path, typer.Option("--file", help="A UTF-8 file, one text a line, none blank.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the CPU unless given.")] = None,
    engine: Annotated[str, typer.Option(help="What computes: native (compiled, CPU), torch, or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, all probabilities in it.")] = False,
) -> None:
    """Print each text's likeliest label and its probability, in the order of the file."""
    from dataclasses import asdict

    import lathe
    from lathe.cli.generate import _device
    from lathe.cli.output import emit_json, write
    from lathe.text.corpus import read_every_line

    texts = read_every_line(file)
    found = lathe.classify(lathe.load(model, device=_device(device)), texts, engine=engine)
    if as_json:
        emit_json({"model": model, "texts": [asdict(each) for each in found]})
        return
    for each in found:
        write(f"{each.label}\t{each.probabilities[each.number]:.3f}\t{each.text}")
