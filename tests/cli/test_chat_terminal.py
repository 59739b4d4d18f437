"""`lathe chat` on a terminal: a real one, with its line discipline, keys and signals."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lathe
from lathe.text import train_tokenizer

CTRL_C, CTRL_D = b"\x03", b"\x04"
# Seconds until a key is pressed again, as anyone would. A signal that comes after Python has written its prompt and
# before it waits for keys is noticed with the next key only; so may be one that the system gives to another thread.
PATIENCE = 15.0
# The terminal becomes the one that signals of its keys go to; a shell's job in the background would not hear Ctrl-C.
START = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, '-m', 'lathe', *sys.argv[1:]])"
)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: str | Path) -> None:
        self.keys, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, words)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(terminal)
        self.unread = b""

    def until(self, text: str, again: bytes = b"") -> str:
        """What is shown up to a text and with it, from where the last call stopped.

        Args:
            again: what is pressed once more whenever the text does not come for long.
        """
        now = time.monotonic()
        end, due = now + 250, now + (PATIENCE if again else 250)
        while text.encode() not in self.unread:
            ready, _, _ = select.select([self.keys], [], [], max(0.0, due - time.monotonic()))
            if ready:
                self.unread += os.read(self.keys, 1024)
            if time.monotonic() >= due:
                assert due < end, f"no {text!r} in {self.unread[-500:]!r}"
                self.press(again)
                due = min(due + PATIENCE, end)
        shown, found, self.unread = self.unread.partition(text.encode())
        return (shown + found).decode(errors="replace")

    def press(self, keys: str | bytes) -> None:
        """Type something."""
        os.write(self.keys, keys.encode() if isinstance(keys, str) else keys)

    def close(self) -> None:
        """End the command, however it stands."""
        self.process.kill()
        self.process.wait()
        os.close(self.keys)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Terminal]:
    """A chat with a tiny model whose answers are far longer than anyone waits for."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 280, convention="gpt2")
    sizes = {"vocab_size": 280, "n_layers": 1, "d_model": 8, "d_ff": 8, "n_heads": 1, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id, "max_positions": 50_600}
    lathe.Model(lathe.preset("gpt2").with_({**tokens, **sizes}), seed=1, tokenizer=tokenizer).save(tmp_path / "model")
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", encoding="utf-8")
    length = ("--max-new-tokens", "50000", "min_new_tokens=50000", "--sample", "--seed", "3")
    terminal = Terminal("chat", tmp_path / "model", "--template", template, *length)
    yield terminal
    terminal.close()


def test_a_conversation(chat: Terminal) -> None:
    shown = chat.until("> ")
    assert "Ctrl-C ends an answer" in shown
    # An answer is shown while it is written, or there would be nothing to see before its end.
    chat.press("the fox\n")
    chat.until("the fox\r\n")
    assert len(chat.until(" ").strip()) < 2000
    chat.press(CTRL_C)
    chat.until("broken off; the conversation goes on", again=CTRL_C)
    chat.until("> ")
    # At the prompt it ends nothing.
    chat.press(CTRL_C)
    chat.until("/quit or Ctrl-D ends the chat", again=CTRL_C)
    chat.until("> ")
    # 601 tokens are left for the conversation: the third message is too much beside the first ones.
    for forgets in (False, True):
        message = "0123456789" * 35
        chat.press(message + "\n")
        chat.until("789\r\n")
        shown = chat.until(" ")
        assert ("forgot" in shown) == forgets
        if forgets:
            assert "the oldest" in chat.until("positions\r\n")
            chat.until(" ")
        chat.press(CTRL_C)
        chat.until("broken off", again=CTRL_C)
        chat.until("> ")
    chat.press("/reset\n")
    chat.until("the conversation is forgotten")
    chat.until("> ")
    chat.press(CTRL_D)
    assert chat.process.wait(timeout=250) == 0
