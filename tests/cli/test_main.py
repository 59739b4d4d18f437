"""The shell of the command line: how a verb is found, and how every failure ends as one line and a code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer

from lathe import _version
from lathe.cli import main as shell
from lathe.errors import LatheError, RequestError

AddVerb = Callable[[str, Any], None]


@pytest.fixture
def add_verb(monkeypatch: pytest.MonkeyPatch) -> AddVerb:
    """Make `lathe NAME` run a function, through a module as a real verb has."""

    def add(name: str, command: Any) -> None:
        module = ModuleType(f"verb_{name}")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(shell.VERBS, name, module.__name__)

    return add


def _raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        """Fail."""
        raise error

    return command


def _in_a_process(*words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "lathe", *words]
    return subprocess.run(command, capture_output=True, env={**os.environ, **variables}, check=False)


def test_the_help_of_a_verb_says_what_each_argument_is(cli) -> None:
    shown = cli("resize", "--help").out
    for said in ("A model's directory, or a hub id.", "Where the new model goes.", "d_model=384"):
        assert said in shown


def test_without_words_it_shows_the_help_and_succeeds(cli, add_verb: AddVerb) -> None:
    add_verb("polish", _raising(RuntimeError()))
    ran = cli()
    assert (ran.code, ran.err) == (0, "")
    assert "polish" in ran.out
    assert ran == cli("--help") == cli("-h")


def test_version(cli) -> None:
    assert cli("--version") == (ran := cli("--version", "--debug"))
    assert (ran.code, ran.out) == (0, f"lathe {_version.__version__}\n")


def test_a_verb_reads_its_words_and_answers_on_stdout(cli, add_verb: AddVerb) -> None:
    def command(model: str, words: Annotated[list[str] | None, typer.Argument()] = None, big: bool = False) -> None:
        typer.echo(f"{model} {words} {big}")

    add_verb("polish", command)
    assert cli("polish", "t5", "a=1", "b=-2", "--big").out == "t5 ['a=1', 'b=-2'] True\n"


def test_a_verb_may_have_verbs_of_its_own(cli, add_verb: AddVerb) -> None:
    app = typer.Typer()
    app.command("coarse")(lambda: typer.echo("rough"))
    app.command("fine")(lambda: typer.echo("smooth"))
    add_verb("polish", app)
    assert cli("polish", "fine").out == "smooth\n"


def test_only_the_named_verb_is_imported(cli, add_verb: AddVerb, monkeypatch: pytest.MonkeyPatch) -> None:
    add_verb("polish", lambda: None)
    monkeypatch.setitem(shell.VERBS, "broken", "lathe.no_such_module")
    assert cli("polish").code == 0


def test_an_unknown_verb_names_the_nearest_and_all(cli, add_verb: AddVerb) -> None:
    add_verb("polish", lambda: None)
    add_verb("saw", lambda: None)
    ran = cli("polsih")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("lathe: there is no verb 'polsih'; did you mean 'polish'? the verbs are ")
    assert "saw" in ran.err
    assert "did you mean" not in cli("xyzzy").err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--frobnicate",), "--frobnicate"),
        (("polish",), "MODEL"),
        (("polish", "t5", "extra"), "extra"),
        (("polish", "t5", "--depth", "abc"), "abc"),
        (("polish", "t5", "--dept", "3"), "--dept"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_2(cli, add_verb: AddVerb, words: tuple[str, ...], says: str) -> None:
    def command(model: Annotated[str, typer.Argument(metavar="MODEL")], depth: int = 1) -> None:
        raise AssertionError

    add_verb("polish", command)
    ran = cli(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("lathe: ")
    assert says in ran.err
    assert ran.err.endswith("--help\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("d_model is 0; give 1 or more"), 2, "lathe: d_model is 0; give 1 or more"),
        (LatheError("the file ends early"), 1, "lathe: the file ends early"),
        (OSError(28, "No space left on device", "out/x"), 1, "lathe: out/x: No space left on device"),
        (ZeroDivisionError(), 1, "lathe: internal error: ZeroDivisionError; run with --debug to see the traceback"),
        (KeyError("w"), 1, "lathe: internal error: KeyError: 'w'; run with --debug to see the traceback"),
        (LatheError("two\nlines, \x1b[31mred\udcff"), 1, "lathe: two lines, \\x1b[31mred\\udcff"),
    ],
)
def test_a_failure_is_one_line_and_its_code(cli, add_verb: AddVerb, error: Exception, code: int, line: str) -> None:
    add_verb("polish", _raising(error))
    ran = cli("polish")
    assert (ran.code, ran.out, ran.err) == (code, "", line + "\n")


def test_an_interrupt_is_quiet(cli, add_verb: AddVerb) -> None:
    add_verb("polish", _raising(KeyboardInterrupt()))
    ran = cli("polish")
    assert (ran.code, ran.out, ran.err) == (130, "", "")


@pytest.mark.parametrize("words", [("--debug", "polish"), ("polish", "--debug")])
def test_debug_shows_the_traceback_before_or_after_the_verb(cli, add_verb: AddVerb, words: tuple[str, ...]) -> None:
    add_verb("polish", _raising(RequestError("no")))
    ran = cli(*words)
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.endswith("\nlathe: no\n")


def test_after_two_dashes_debug_is_a_word_like_any_other(cli, add_verb: AddVerb) -> None:
    def command(text: str) -> None:
        typer.echo(text)

    add_verb("polish", command)
    assert cli("polish", "--", "--debug").out == "--debug\n"


def test_a_reader_that_leaves_ends_it_without_a_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "lathe", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_stdout_does_no_harm() -> None:
    script = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'lathe', '--help'])"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_that_knows_only_ascii_gets_its_line() -> None:
    done = _in_a_process("größer", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert done.stderr.startswith(b"lathe: there is no verb 'gr??er'")


def test_a_word_that_is_no_utf8_is_shown_escaped() -> None:
    done = subprocess.run([sys.executable, "-m", "lathe", b"\xff"], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"udcff" in done.stderr
