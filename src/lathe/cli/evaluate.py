"""`lathe evaluate MODEL --data FILE [key=value …]`: how good a model is on text it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.cli.settings import parse_settings
from lathe.errors import RequestError

if TYPE_CHECKING:
    from lathe.train.measure import OnText

# What the table of tasks has, and how it is headed.
_COLUMNS = {
    "loss": "loss",
    "bits_per_byte": "bits/byte",
    "exact_match": "exact",
    "bleu": "BLEU",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "cut_off": "cut off",
}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or an adapter's, or a hub id.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="objective=masked, data.length=256, data.rows=32, data.fields.text=document, precision=bf16; "
            "of what a model writes: generate.max_new_tokens=64, batch=32, bleu_tokenize=char, write=false …",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="What to evaluate on: a file, or a dataset's name.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Evaluate on a run's validation data, as it was asked: its directory, run.json or RUN.yaml."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Put this adapter on the model; adapter=DIRECTORY.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first records (of each task); limit=N.")] = None,
    outputs: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Keep source, reference and output of every text.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, mps, cpu; device=NAME.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss, perplexity, bits per byte; accuracy and F1; exact match, BLEU and chrF of written text."""
    words: dict[str, Any] = dict(parse_settings(settings or []))
    options = {"data": data, "adapter": adapter, "limit": limit, "outputs": outputs, "device": device}
    for key, value in options.items():
        if value is None:
            continue
        if key in words:
            raise RequestError(f"{key} is set twice, by an option and by a word; set it once")
        words[key] = value
    if run is None and not any(key == "data" or key.startswith("data.t") for key in words):
        raise RequestError(
            "there is nothing to evaluate on: give --data FILE, or --run for a run's own validation data"
        )
    words["model"] = model
    from lathe.cli.output import emit_json
    from lathe.train.measure import measure
    from lathe.train.request import read_evaluation

    request = read_evaluation(words, None if run is None else _run_tree(run))
    with _texts() as on_text:
        found = measure(request, on_text=on_text)
    if as_json:
        emit_json({"model": model, **found})
    else:
        _show(found)


def _run_tree(run: Path) -> Any:
    """What a run was asked, from its directory or its file."""
    from lathe.cli.train import read_run

    return read_run(run / "run.json" if run.is_dir() else run)


@contextmanager
def _texts() -> Iterator[OnText]:
    """A bar of the texts that a model writes, from the first one on."""
    from lathe.cli.output import Advance, progress

    with ExitStack() as stack:
        bar: list[Advance] = []

        def on_text(done: int, total: int) -> None:
            if not bar:
                bar.append(stack.enter_context(progress("writing", total)))
            bar[0](done)

        yield on_text


def _show(found: Mapping[str, Any]) -> None:
    from lathe.cli.output import answers

    for name, value in found.items():
        if name == "tasks":
            _show_tasks(value)
        elif name == "signatures":
            for metric, signature in value.items():
                answers().print(f"{metric}: {signature}", soft_wrap=True)
        elif name == "generation":
            asked = ", ".join(f"{key}={each}" for key, each in value.items())
            answers().print(f"written with: {asked}", soft_wrap=True)
        else:
            answers().print(f"{name.replace('_', ' ')}: {_number(value)}", soft_wrap=True)


def _show_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each task."""
    from rich import box
    from rich.table import Table

    from lathe.cli.output import answers

    columns = [name for name in _COLUMNS if any(name in task for task in tasks.values())]
    table = Table("task", box=box.SIMPLE)
    for name in columns:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    for name, task in tasks.items():
        table.add_row(name, *(_number(task[key], 3) if key in task else "" for key in columns))
    answers().print(table)


def _number(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
