"""`lathe VERB …`: find the verb, run it, and turn whatever goes wrong into one line and an exit code.

A verb is a module of this package with a function `command` (or a `typer.Typer`, for a verb that has
verbs of its own) whose signature typer reads. To add one, write `cli/<verb>.py` and add its line to
VERBS. A verb's module is imported when the verb is named, and must itself be cheap to import: what it
needs of torch it imports inside the function. So `lathe plan` and `lathe --help` never load torch.

Exit codes: 0 done, 1 failed, 2 the request was wrong, 130 interrupted, 141 the reader of a pipe left.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lathe._version import __version__
from lathe.errors import ExistsError, LatheError, RequestError

# The verbs, in the order that `lathe --help` lists them, and the module of each.
VERBS: dict[str, str] = {
    "plan": "lathe.cli.plan",
    "resize": "lathe.cli.resize",
    "quantize": "lathe.cli.quantize",
    "compare": "lathe.cli.compare",
    "train": "lathe.cli.train",
    "evaluate": "lathe.cli.evaluate",
    "report": "lathe.cli.report",
    "adapt": "lathe.cli.adapt",
    "generate": "lathe.cli.generate",
    "chat": "lathe.cli.chat",
    "encode": "lathe.cli.encode",
    "classify": "lathe.cli.classify",
    "export": "lathe.cli.export",
    "look": "lathe.cli.look",
    "tokenize": "lathe.cli.tokenize",
    "tokenizer": "lathe.cli.tokenizer",
    "quickstart": "lathe.cli.quickstart",
}

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141

# typer's base of all usage errors; it exports only this subclass, and which package holds the base
# depends on the version.
_UsageError: Any = typer.BadParameter.__mro__[1]

_DEBUG_NOTE = "Every verb also takes --debug: show the traceback when something goes wrong."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own) and return the exit code."""
    _prepare_streams()
    _prepare_threads()
    words, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        # Not left to the interpreter's exit, where a closed pipe would print a traceback.
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_PIPE_CLOSED
    except Exception as error:  # noqa: BLE001 - the one place where every failure ends
        if debug:
            traceback.print_exception(error)
        message, code = _describe(error)
        sys.stderr.write(f"lathe: {_one_line(message)}\n")
    return code


def _run(words: list[str]) -> int:
    command = _build()
    try:
        with command.make_context("lathe", words or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


class _VerbGroup(TyperGroup):
    """The verbs of VERBS, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        verb = importlib.import_module(VERBS[cmd_name]).command
        if isinstance(verb, typer.Typer):
            return typer.main.get_command(verb)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name=cmd_name, epilog=_DEBUG_NOTE)(verb)
        return typer.main.get_command(app)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RequestError(f"there is no verb {args[0]!r}; {hint}the verbs are {', '.join(VERBS)}")
        return super().resolve_command(ctx, args)


def _build() -> Any:
    app = typer.Typer(
        cls=_VerbGroup,
        add_completion=False,
        rich_markup_mode=None,
        subcommand_metavar="VERB ...",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Cut transformer language models to size. `lathe VERB --help` says more about a verb.",
        epilog=_DEBUG_NOTE,
    )

    app.callback()(_options)
    return typer.main.get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lathe {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hold the options that stand before a verb; `--version` acts through its callback."""


def _take_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out, wherever it stands before a bare `--`; whether it was there comes second."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def _describe(error: Exception) -> tuple[str, int]:
    """Say what went wrong, and the exit code that goes with it."""
    if isinstance(error, ExistsError):  # the verbs write over nothing
        return f"{error.what}, or remove it", error.exit_code
    if isinstance(error, LatheError):
        return str(error), error.exit_code
    if isinstance(error, _UsageError):
        path = error.ctx.command_path if error.ctx else "lathe"
        return f"{error.format_message().rstrip('.')}{_given(error)}; see {path} --help", error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", EXIT_FAILED
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"internal error: {what}; run with --debug to see the traceback", EXIT_FAILED


def _given(error: Exception) -> str:
    """Name the value that was refused, where typer's own message leaves it out."""
    from pydantic import ValidationError

    cause = error.__cause__
    return f" (given {cause.errors()[0]['input']!r})" if isinstance(cause, ValidationError) else ""


def _one_line(message: str) -> str:
    """Make the message one printable line: a file or tensor name may hold anything."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _prepare_threads() -> None:
    """Let OpenMP's threads wait at a barrier for microseconds instead of milliseconds before they sleep.

    With any other work on the cores, the long wait spins away the time that the others would finish in: a training
    step on two busy cores took 0.86 s with it and 0.29 s without, and 0.12 s and 0.13 s on idle ones.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _prepare_streams() -> None:
    """Make both streams safe to write to: there, and never failing on a character."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        # A stream that a test or a notebook put here may have no such method, and encodes nothing.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail again."""
    # A stream without a descriptor has no last flush to fail.
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
