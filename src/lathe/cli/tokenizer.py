"""`lathe tokenizer DIRECTORY --from FILE … [field=value …]`: train a tokenizer and save it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
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
    corpus: Annotated[list[Path] | None, typer.Option("--from", help="A UTF-8 text file; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a tokenizer on text files, in the form that a family's own have."""
    from lathe.cli.output import answers, emit_json
    from lathe.cli.settings import parse_settings

    if not corpus:
        raise RequestError("there is no text to train on: give --from FILE, as often as there are files")
    answer = train(directory, corpus, parse_settings(settings or []))
    if as_json:
        emit_json(answer)
    else:
        _show(answers(), answer)


def train(directory: Path, corpus: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and save a tokenizer; nothing is written if anything goes wrong.

    Args:
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
        tokenizer = train_tokenizer(list(corpus), **{"vocab_size": _VOCAB_SIZE, **settings})
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


def _measure(tokenizer: Tokenizer, corpus: Sequence[Path]) -> dict[str, Any]:
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
