"""`lathe export MODEL DST --to gguf|ctranslate2|onnx`: a model for another program, run there before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lathe.export.job import Exported


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's or an adapter's directory, or a hub id.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A file that ends in .gguf, or a directory; it must not exist.")
    ],
    to: Annotated[str, typer.Option(help="gguf (llama.cpp), ctranslate2, or onnx (encoders).")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="How weights are stored. gguf: f16, f32, q8_0, q4_0; ctranslate2: float32, float16, bfloat16, int16, "
            "int8; onnx: float32. The first where left out.",
        ),
    ] = None,
    body: Annotated[bool, typer.Option("--body", help="Leave the token head and the classifier out.")] = False,
    name: Annotated[str | None, typer.Option(help="What the file calls the model; else DST's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for llama.cpp, CTranslate2 or ONNX, run it there, and say how far its outputs are."""
    import lathe
    from lathe.cli.output import answers, emit_json
    from lathe.export.job import export, require_ready

    require_ready(destination, to, kind)
    opened = lathe.load(model)
    done = export(
        opened, destination, to=to, kind=kind, body=body, tokenizer=opened.tokenizer, name=name or Path(model).name
    )
    if as_json:
        emit_json(done.to_dict())
        return
    for line in lines(done):
        answers().print(line, soft_wrap=True)


def lines(done: Exported) -> list[str]:
    """The report, a line for each thing that was found."""
    report = [f"{done.path}: {done.to}, {done.kind}, {done.nbytes:,} bytes", *(f"note: {note}" for note in done.notes)]
    if done.checked is None:
        return [*report, f"not verified: {done.unchecked}"]
    difference, checked = done.checked.difference, done.checked
    report.append(
        f"verified in {checked.runtime}: {checked.what} at {difference.places} places, largest error "
        f"{difference.max_error:.2g} ({difference.relative_error:.2g} of their spread), the same greatest one at "
        f"{difference.agreement:.0%}"
    )
    if checked.texts is not None:
        report.append(f"its tokenizer cuts {checked.texts} texts into the same ids")
    return report
