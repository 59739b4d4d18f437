"""`lathe tokenize MODEL TEXT…`: how texts come out as pieces and ids, side by side, padded as a model gets them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from lathe.text.tokenizer import Tokenizer

# A longer piece is cut in the table; --json has it whole.
_WIDEST_PIECE = 24


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory with a tokenizer, or a hub id.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT…", help="What to tokenize.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Take texts from a UTF-8 file, one a line.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", help="A second text to go with each.")] = None,
    padding_side: Annotated[
        str | None, typer.Option("--padding-side", help="left or right; default the tokenizer's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the pieces, ids and masks of texts side by side."""
    from lathe.checkpoint.hub import fetch
    from lathe.cli.output import answers, emit_json
    from lathe.text.tokenizer import Tokenizer

    given = [*(texts or []), *(_lines(file) if file is not None else [])]
    if not given:
        raise RequestError("there is nothing to tokenize: give TEXT, or --file with texts, one a line")
    tokenizer = Tokenizer.load(fetch(model, weights=False))
    answer = tokenize(tokenizer, given, pair=pair, padding_side=padding_side)
    if as_json:
        emit_json({"model": model, **answer})
    else:
        _show(answers(), tokenizer, {"model": model, **answer})


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], *, pair: str | None = None, padding_side: str | None = None
) -> dict[str, Any]:
    """What a batch of these texts holds, as the answer of `--json`.

    A tokenizer without a padding token pads with its end token here (`pad_token` is then null): the table is to be
    looked at, and the mask is what counts.
    """
    if padding_side not in (None, "left", "right"):
        raise RequestError(f"--padding-side {padding_side}: expected left or right")
    pad_id = tokenizer.pad_id
    batch = tokenizer(
        list(texts),
        None if pair is None else [pair] * len(texts),
        padding_side="left" if padding_side == "left" else "right" if padding_side else None,
        pad_id=(tokenizer.eos_id or 0) if pad_id is None else None,
    )
    columns = {name: tensor.tolist() for name, tensor in batch.items()}
    rows = []
    for number, text in enumerate(texts):
        ids, mask = columns["input_ids"][number], columns["attention_mask"][number]
        rows.append(
            {
                "text": text,
                **({} if pair is None else {"pair": pair}),
                "tokens": sum(mask),
                "pieces": tokenizer.pieces(ids),
                **{name: column[number] for name, column in columns.items()},
                "decoded": tokenizer.decode([each for each, real in zip(ids, mask, strict=True) if real]),
            }
        )
    return {
        "vocab_size": tokenizer.vocab_size,
        "pad_token": None if pad_id is None else tokenizer.pieces([pad_id])[0],
        "padding_side": padding_side or tokenizer.padding_side,
        "texts": rows,
    }


def _lines(file: Path) -> list[str]:
    from lathe.text.corpus import read_lines

    return [line.rstrip("\r\n") for line in read_lines(file)]


# --- the table -------------------------------------------------------------------------------------------


def _show(console: Console, tokenizer: Tokenizer, answer: dict[str, Any]) -> None:
    """Print the texts, and then tables with as many texts side by side as the width holds."""
    from rich.text import Text

    rows = answer["texts"]
    pad = "no padding token" if answer["pad_token"] is None else f"padding {answer['pad_token']}"
    # A long path may take several lines; the rest stays together.
    console.print(answer["model"])
    console.print(f"{answer['vocab_size']:,} tokens, {pad}, on the {answer['padding_side']}")
    for number, row in enumerate(rows, start=1):
        text = row["text"] if "pair" not in row else f"{row['text']} + {row['pair']}"
        line = Text(f"{number:>4}  {row['tokens']:>4} tokens  {_one_line(text)}")
        line.truncate(console.width, overflow="ellipsis")
        console.print(line)
    columns = [_column(tokenizer, number, row) for number, row in enumerate(rows, start=1)]
    width = 0
    block: list[dict[str, Any]] = []
    # The positions take the first column of each table.
    room = console.width - len(str(len(rows[0]["input_ids"]))) - 2
    for column in columns:
        if block and width + column["width"] > room:
            _print_block(console, block)
            block, width = [], 0
        block.append(column)
        width += column["width"]
    _print_block(console, block)


def _column(tokenizer: Tokenizer, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The cells of one text, and how wide they are with the spaces before them."""
    from rich.cells import cell_len, set_cell_size

    from lathe.text.readable import readable_pieces

    pieces = readable_pieces(tokenizer, row["input_ids"])
    pieces = [p if cell_len(p) <= _WIDEST_PIECE else set_cell_size(p, _WIDEST_PIECE - 1) + "…" for p in pieces]
    cells = {f"text {number}": pieces, "id": row["input_ids"], "mask": row["attention_mask"]}
    if "token_type_ids" in row:
        cells["type"] = row["token_type_ids"]
    widths = [max(cell_len(str(cell)) for cell in [name, *values]) for name, values in cells.items()]
    return {"cells": cells, "mask": row["attention_mask"], "width": sum(widths) + 2 * len(widths) + 1}


def _print_block(console: Console, block: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", justify="right", style="dim", no_wrap=True)
    for column in block:
        for place, name in enumerate(column["cells"]):
            table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for position in range(len(block[0]["mask"])):
        line = [Text(str(position))]
        for column in block:
            style = "" if column["mask"][position] else "dim"
            line += [Text(str(values[position]), style=style) for values in column["cells"].values()]
        table.add_row(*line)
    console.print()
    console.print(table)


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
