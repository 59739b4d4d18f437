"""Where the command line's words go: answers to stdout, everything else to stderr.

Verbs print through this module alone, so a script can trust that stdout holds the answer and nothing
besides, and that with `--json` the answer is one JSON object. Colours follow the terminal and
`NO_COLOR`; away from a terminal the width is 80 columns (or `COLUMNS`), so that what a file or a pipe
receives does not depend on the window it was started from.

rich is imported when something is printed: a verb's module stays cheap to import for `lathe --help`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from lathe.errors import LatheError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 80
# Away from a terminal, progress is a line at each of this many parts of the work.
PLAIN_STEPS = 10


class Advance(Protocol):
    """Called as work proceeds: how many units were done, and a note on how it stands."""

    def __call__(self, done: int = 1, note: str = "") -> None: ...


def answers() -> Console:
    """A console on stdout, for tables and text that are the answer."""
    return _console(sys.stdout)


def messages() -> Console:
    """A console on stderr, for progress, logs and warnings."""
    return _console(sys.stderr)


def say(line: str) -> None:
    """Write one line about the work to stderr, unwrapped."""
    messages().print(line, soft_wrap=True)


def write(text: str) -> None:
    """Write text that is the answer to stdout as it stands, with an end of line; rich is not imported for it."""
    sys.stdout.write(text + "\n")


def emit_json(answer: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout, with an end of line.

    JSON has no NaN or infinity: LatheError names the first number that is one. Characters that stdout
    cannot encode are written as JSON escapes.
    """
    unwritable = _first_unwritable(answer, "")
    if unwritable is not None:
        raise LatheError(f"the answer cannot be written as JSON: {unwritable}; leave out --json to see it")
    text = json.dumps(answer, indent=2, allow_nan=False, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(answer, indent=2, allow_nan=False, ensure_ascii=True)
    sys.stdout.write(text + "\n")


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show work of `total` units on stderr: a bar on a terminal, about ten plain lines elsewhere.

    Yields a function to call as units are done, `advance(1, "loss 3.21")`.
    """
    console = messages()
    with _bar(console, title, total) if console.is_terminal else _lines(console, title, total) as advance:
        yield advance


class Terminal:
    """Remarks and progress on stderr, for library functions that report what they do."""

    def say(self, line: str) -> None:
        """One line about the work."""
        say(line)

    def work(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Work of `total` units; the function yielded is told how many are done."""
        return progress(title, total)


@contextmanager
def _bar(console: Console, title: str, total: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(done: int = 1, note: str = "") -> None:
            bar.update(task, advance=done, note=note)

        yield advance


@contextmanager
def _lines(console: Console, title: str, total: int) -> Iterator[Advance]:
    finished = 0

    def advance(done: int = 1, note: str = "") -> None:
        nonlocal finished
        part_before = finished * PLAIN_STEPS // max(total, 1)
        finished += done
        if finished * PLAIN_STEPS // max(total, 1) > part_before:
            console.print(f"{title} {finished}/{total} {note}".rstrip(), soft_wrap=True)

    yield advance


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    # A file or pipe gets 80 columns whatever window it was started from; rich reads COLUMNS itself.
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    # A model's name or a piece of text may hold brackets and colons: it is never markup.
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def _first_unwritable(value: Any, where: str) -> str | None:
    """Say which number within `value` is not finite, as `after.loss is nan`, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} is {value}"
    if isinstance(value, Mapping):
        parts = [(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(item, f"{where}[{index}]") for index, item in enumerate(value)]
    else:
        return None
    found = (_first_unwritable(item, place) for item, place in parts)
    return next((problem for problem in found if problem is not None), None)
