"""`lathe tokenizer DIRECTORY --from FILE … [field=value …]`: train a tokenizer and save it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from lathe.text.tokenizer import Tokenizer

_VOCAB_SIZE = 8000
# What the report measures is measured on so many lines from the start of the corpus.
_MEASURED_LINES = 10_000
# Files that are unpacked, or read record by record; any other name is plain text.
_RECORDS = (".gz", ".json", ".jsonl", ".ndjson", ".tsv", ".csv", ".parquet")


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to save it; must not exist.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE…",
            help=f"vocab_size={_VOCAB_SIZE}, convention=t5|bert|electra|albert|bart|gpt2|llama, model=unigram|bpe, "
            "sentinels=100, byte_fallback=true, character_coverage=0.9995, normalisation=nmt_nfkc, lowercase=true, "
            "strip_accents=false, max_lines=200000, seed=0",
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option("--from", help="A UTF-8 file of text or of records, .gz too; may be repeated.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="Where a file of records has its text; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a tokenizer on text files, in the form that a family's own have."""
    from lathe.cli.output import answers, emit_json
    from lathe.cli.settings import parse_settings

    if not corpus:
        raise RequestError("there is no text to train on: give --from FILE, as often as there are files")
    if columns and not any(file.suffix.lower() in _RECORDS for file in corpus):
        raise RequestError(
            f"--column {columns[0]}: {corpus[0]} is plain text and has no columns; leave it out, or give records "
            "(.jsonl, .tsv, .csv, .parquet)"
        )
    answer = train(directory, Texts(corpus, columns or ["text"]), parse_settings(settings or []))
    if as_json:
        emit_json(answer)
    else:
        _show(answers(), answer)


@dataclass(frozen=True)
class Texts:
    """The text of files: each line of a plain one, the columns of each record of `.jsonl`, `.tsv`, `.gz` and so on."""

    files: Sequence[Path]
    columns: Sequence[str] = ("text",)

    def __iter__(self) -> Iterator[str | Path]:
        from lathe.data.sources import read

        for file in self.files:
            if file.suffix.lower() in _RECORDS:
                for record in read(file, fields={column: column for column in self.columns}):
                    yield from record.values()
            else:
                yield file


def train(directory: Path, corpus: Texts, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and save a tokenizer; nothing is written if anything goes wrong.

    Args:
        corpus: the text to train on; it is read twice.
        settings: arguments of `lathe.text.train_tokenizer`.

    Returns:
        What it is, and how it cuts the first lines of the corpus: characters per token, the share of unknowns.
    """
    from lathe.checkpoint.atomic import atomic_directory
    from lathe.text.train import train_tokenizer

    known = [name for name in inspect.signature(train_tokenizer).parameters if name != "corpus"]
    for name in settings:
        if name not in known:
            raise RequestError(f"a tokenizer has no {name}: expected one of {', '.join(known)}")
    # The place is asked for first: training may take long.
    with atomic_directory(directory) as folder:
        tokenizer = train_tokenizer(corpus, **{"vocab_size": _VOCAB_SIZE, **settings})
        tokenizer.save(folder)
        files = sorted(path.name for path in folder.iterdir())
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "directory": str(directory),
        "files": files,
        "bytes": nbytes,
        "vocab_size": tokenizer.vocab_size,
        "sentinels": len(tokenizer.sentinels),
        "special_tokens": {
            role: getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos", "unk", "mask", "cls", "sep")
        },
        "measured": _measure(tokenizer, corpus),
    }


def _measure(tokenizer: Tokenizer, corpus: Texts) -> dict[str, Any]:
    from lathe.text.corpus import read_lines

    lines = [line.rstrip("\r\n") for line in islice(read_lines(corpus), _MEASURED_LINES)]
    rows = tokenizer.encode_batch(lines, add_special_tokens=False)
    tokens = sum(map(len, rows))
    unknown = sum(row.count(tokenizer.unk_id) for row in rows if tokenizer.unk_id is not None)
    return {
        "lines": len(lines),
        "characters_per_token": sum(map(len, lines)) / max(tokens, 1),
        "unknown_share": unknown / max(tokens, 1),
    }


def _show(console: Console, answer: dict[str, Any]) -> None:
    special = ", ".join(f"{role} {number}" for role, number in answer["special_tokens"].items() if number is not None)
    measured = answer["measured"]
    sentinels = f", {answer['sentinels']} sentinels" if answer["sentinels"] else ""
    # A long path may take several lines; the rest stays together.
    console.print(answer["directory"])
    console.print(f"{answer['vocab_size']:,} tokens, {answer['bytes']:,} bytes in {', '.join(answer['files'])}")
    console.print(f"special tokens: {special}{sentinels}")
    console.print(
        f"on the first {measured['lines']:,} lines of its corpus: {measured['characters_per_token']:.2f} characters a "
        f"token, {measured['unknown_share']:.2%} of the tokens unknown"
    )
