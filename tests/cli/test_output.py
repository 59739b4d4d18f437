"""What reaches stdout and stderr, and in what form."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from rich.table import Table

from lathe.cli.output import answers, emit_json, messages, progress, say
from lathe.errors import LatheError


def test_json_is_one_object_on_stdout_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"name": "größe ▁Hello", "total": 60506624, "loss": None, "rows": [{"x": 0.5}]}
    emit_json(answer)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == answer
    assert captured.err == ""
    assert "größe ▁Hello" in captured.out


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"after": {"loss": float("nan")}}, "after.loss is nan"),
        ({"rows": [{"x": 1.0}, {"x": float("-inf")}]}, r"rows\[1\].x is -inf"),
        ({"pair": (1.0, float("inf"))}, r"pair\[1\] is inf"),
    ],
)
def test_json_refuses_what_json_cannot_hold(
    answer: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LatheError, match=says):
        emit_json(answer)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["größe", "\udcff"])
def test_json_escapes_what_stdout_cannot_encode(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", stream := io.TextIOWrapper(raw, encoding="ascii"))
    emit_json({"text": text})
    stream.flush()
    assert json.loads(raw.getvalue()) == {"text": text}


def test_answers_and_messages_go_to_their_own_stream(capsys: pytest.CaptureFixture[str]) -> None:
    answers().print("answer")
    messages().print("message")
    say("x" * 200)
    captured = capsys.readouterr()
    assert captured.out == "answer\n"
    assert captured.err == "message\n" + "x" * 200 + "\n"


def test_text_is_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    answers().print("[bold]model[/bold] :smile: [/x]")
    assert capsys.readouterr().out == "[bold]model[/bold] :smile: [/x]\n"


def test_away_from_a_terminal_a_table_is_plain_and_80_wide(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("left", "right", expand=True)
    table.add_row("a", "b", style="red")
    answers().print(table)
    out = capsys.readouterr().out
    assert {len(line) for line in out.splitlines()} == {80}
    assert "\x1b" not in out


def test_columns_sets_another_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    answers().print(Table("left", expand=True))
    assert {len(line) for line in capsys.readouterr().out.splitlines()} == {40}


@pytest.mark.parametrize(("total", "lines"), [(100, 10), (3, 3), (1000, 10)])
def test_away_from_a_terminal_progress_is_about_ten_lines(
    total: int, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("cutting", total) as advance:
        for _ in range(total):
            advance(note="loss 1.5")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == lines
    assert captured.err.splitlines()[-1] == f"cutting {total}/{total} loss 1.5"


def test_on_a_terminal_progress_is_a_bar_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("cutting [x]", 4) as advance:
        advance(4, "done")
    assert "cutting [x]" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_progress_without_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("cutting", 0):
        pass
    assert capsys.readouterr().err == ""


def test_printing_is_what_imports_rich() -> None:
    script = "import sys, lathe.cli.output; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
