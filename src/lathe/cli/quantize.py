"""`lathe quantize SRC DST --bits 8|4`: a model's matrices as whole numbers, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.cli.destination import require_free
from lathe.cli.output import Terminal, answers, emit_json
from lathe.cli.settings import parse_settings
from lathe.errors import RequestError

if TYPE_CHECKING:
    from lathe.quantization.job import QuantizeRequest
    from lathe.quantization.outcome import Outcome

_TEXTS = ("calibrate", "data", "objective")


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model's directory, or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Where the quantised model goes.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="calibrate.tokens=100000, calibrate.field=document, data.tokens=50000, data.field=document, "
            "objective=masked, seed=1.",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(metavar="8|4", help="Bits of a weight.")] = 8,
    calibrate: Annotated[str | None, typer.Option(metavar="FILE", help="Text that the codes are chosen on.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to measure on; else a tenth of the calibration text.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How codes are chosen: nearest, or gptq (with text; for 4 bits if left out).")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="int8 rounds inputs too (8 bits, if left out); none does not.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(metavar="N", help="Weights that share a scale: 32, 64, 128; 0 for a row.")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Codes without or with a zero point.")
    ] = True,
    tables: Annotated[
        int, typer.Option(metavar="8|4|16", help="Bits of the token table and the output matrix; 16: as they are.")
    ] = 8,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="Leave a layer alone: its name, a beginning, a pattern.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model with int8 or int4 weights, and report bytes, loss and the layers that it hurt."""
    from lathe.quantization.job import Job
    from lathe.report.quantizing import pages

    words: dict[str, Any] = dict(parse_settings(settings or []))
    for name, value in (("calibrate", calibrate), ("data", data)):
        if value is not None and name in words:
            raise RequestError(f"{name} is set twice, by an option and by a word; set it once")
        if value is not None:
            words[name] = value
    how = {
        "bits": bits,
        "method": method,
        "activations": activations,
        "group": group,
        "symmetric": symmetric,
        "tables": tables,
        "keep": tuple(keep or ()),
    }
    require_free(destination)
    outcome = Job(_request(source, how, words)).run(destination, pages=pages, reporter=Terminal())
    if as_json:
        emit_json({"directory": str(destination), **outcome.to_dict()})
    else:
        _show(outcome, destination)


def _request(source: str, how: dict[str, Any], words: dict[str, Any]) -> QuantizeRequest:
    from lathe.quantization.job import QuantizeRequest
    from lathe.quantization.settings import QuantizeSettings
    from lathe.reshape.request import read_objective, read_text

    odd = [name for name in words if name.partition(".")[0] not in _TEXTS and name != "seed"]
    if odd:
        raise RequestError(f"{odd[0]}={words[odd[0]]}: expected calibrate.…, data.…, objective or seed")
    return QuantizeRequest(
        source=source,
        settings=QuantizeSettings(**how),
        calibrate=read_text("calibrate", words),
        data=read_text("data", words),
        objective=read_objective(words),
        seed=words.get("seed", 0),
    )


def _show(outcome: Outcome, destination: Path) -> None:
    from rich.table import Table

    from lathe.report.quantizing import WORST, proposal_lines, reload_lines, size_rows, worst_rows

    console = answers()
    header, rows = size_rows(outcome)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    layers = Table(*WORST)
    for row in worst_rows(outcome, 6):
        layers.add_row(*row)
    console.print(layers)
    for line in [*proposal_lines(outcome), *reload_lines(outcome)]:
        console.print(line, soft_wrap=True)
    console.print(f"{destination}: the model, its recipe (lathe.json), report.html and README.md", soft_wrap=True)
