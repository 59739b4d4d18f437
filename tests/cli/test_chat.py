"""`lathe chat`: lines in, answers out, commands, and its one line where it cannot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import lathe
from lathe.text import train_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog while seventeen rabbits watch from behind the garden wall"] * 24


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer and no template, saved, whose stored settings ask for beams."""
    tokenizer = train_tokenizer(CORPUS, 300, convention="gpt2")
    sizes = {"vocab_size": 300, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id, "max_positions": 90}
    model = lathe.Model(
        lathe.preset("gpt2").with_({**tokens, **sizes}), seed=1, tokenizer=tokenizer, generation={"num_beams": 2}
    )
    path = tmp_path_factory.mktemp("models") / "gpt2"
    model.save(path)
    return path


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", encoding="utf-8")
    return path


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_each_line_is_answered_in_turn(cli, gpt2: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("chat", gpt2, "--template", template, "--max-new-tokens", "4")
    stdin(monkeypatch, b"\xef\xbb\xbfthe fox\n\nthe dog\n/quit\nnever read\n")
    ran = cli(*words, "--json")
    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 0
    assert [each["message"] for each in answers] == ["the fox", "the dog"]
    assert answers[0].keys() == {"message", "answer", "tokens", "ended", "forgotten"}
    assert "the model asks for num_beams=2, which a chat does not do; going on without" in ran.err
    stdin(monkeypatch, b"the fox\nthe dog\n")
    plain = cli(*words)
    assert [line.strip() for line in plain.out.splitlines()] == [each["answer"] for each in answers]
    assert plain.err.count("the answer was cut at 4 tokens") == 2


def test_reset_forgets_and_a_full_history_is_said(
    cli, gpt2: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("chat", gpt2, "--template", template, "--system", "lazy", "--max-new-tokens", "8", "--json")
    long = b"seventeen rabbits watch from behind the garden wall 0123456789 0123456789\n"
    stdin(monkeypatch, b"the fox\n/reset\nthe fox\n/what\n" + long + long)
    ran = cli(*words)
    assert ran.code == 0
    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert answers[0] == answers[1]
    assert [each["forgotten"] > 0 for each in answers] == [False, False, False, True]
    assert "the conversation is forgotten" in ran.err
    assert "there is no command /what; /reset to forget the conversation" in ran.err
    assert "forgot the oldest 2 turns" in ran.err
    assert "within the model's 90 positions" in ran.err


def test_the_modules_and_the_native_step_answer_alike(
    cli, gpt2: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for engine in ("torch", "native"):
        stdin(monkeypatch, b"the fox\nthe dog\n")
        ran = cli("chat", gpt2, "--template", template, "--max-new-tokens", "6", "--engine", engine, "--json")
        assert ran.code == 0
        found.append(ran.out)
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "content", "says"),
    [
        ((), b"the fox\n", "this tokenizer has no chat template, as a base model's has none: name the one"),
        (("--template", "llama3"), b"the fox\n", "there is no chat template 'llama3': expected alpaca"),
        (("--template", "none.jinja"), b"the fox\n", "--template none.jinja cannot be read: No such file"),
        (("--template", "vicuna"), b"the fox\n", "shorten it, or lower max_new_tokens"),
        (("--template", "vicuna", "num_beams=2"), b"the fox\n", "num_beams=2: a chat has one answer at a time"),
        (("--template", "{{ messages[-1].content }}"), b"the fox\xff\n", "stdin is not UTF-8: line 1, byte 8"),
        (("--template", "{{ messages[-1].content }}", "--temperature", "0"), b"x\n", "temperature=0.0: expected"),
        (("--template", "vicuna", "--engine", "fast"), b"the fox\n", "engine='fast': expected auto, native, torch"),
    ],
)
def test_what_cannot_be_is_one_line(
    cli, gpt2: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], content: bytes, says: str
) -> None:
    stdin(monkeypatch, content)
    ran = cli("chat", gpt2, *words)
    assert ran.code == 2
    assert ran.out == ""
    last = ran.err.splitlines()[-1]
    assert last.startswith("lathe: ")
    assert says in last
