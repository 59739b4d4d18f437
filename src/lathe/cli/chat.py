"""`lathe chat MODEL`: talk to a model, on a terminal or line by line through a pipe."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lathe.generate.chat import Chat, Reply

COMMANDS = {"/reset": "forget the conversation", "/quit": "end the chat, as Ctrl-D does", "/help": "show this"}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or an adapter's, or a hub id.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="Any setting of generation, as for lathe generate."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="alpaca, vicuna, llama-2, llama-3, one of the tokenizer's, or a .jinja file; else its own."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What stands before the conversation and is kept.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="How many tokens an answer has at most.")] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; else as stored.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 safer, above 1 wilder; samples.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; samples.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest with this much chance; samples.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and messages give the same answers.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model: its directory.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the CPU unless given.")] = None,
    engine: Annotated[
        str, typer.Option(help="What computes: native (compiled, CPU), torch, or auto; the tokens are the same.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each answer, a line each.")
    ] = False,
) -> None:
    """Talk to a model. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer."""
    from lathe.cli.generate import _settings

    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    chat = _open(model, adapter, device, template, system, engine, _settings(words or [], options))
    if sys.stdin.isatty():
        _converse(chat, model, as_json)
    else:
        for line in _piped_lines():
            if not _obeyed(chat, line):
                _show(chat.ask(line), chat, line, as_json)


def _open(
    name: str,
    adapter: Path | None,
    device: str | None,
    template: str | None,
    system: str | None,
    engine: str,
    asked: dict[str, Any],
) -> Chat:
    import secrets

    from lathe.cli.generate import _device, _load
    from lathe.cli.output import say
    from lathe.generate.chat import Chat
    from lathe.generate.settings import turned_off

    source = _source(template)
    model = _load(name, adapter, _device(device))
    if model.tokenizer is None:
        raise RequestError(f"{name} has no tokenizer; put its tokenizer's files beside its weights")
    off = {key: value for key, value in turned_off(model.generation).items() if key not in asked}
    for key in ("num_beams", "num_return_sequences"):
        if key not in asked and (model.generation.get(key) or 1) > 1:
            off[key] = 1
    if off:
        wanted = ", ".join(f"{key}={model.generation[key]}" for key in off)
        say(f"the model asks for {wanted}, which a chat does not do; going on without")
    settings = {"seed": secrets.randbits(32), **off, **asked}
    common: dict[str, Any] = {"template": source, "system": system, "stored": model.generation, "engine": engine}
    return Chat(model, model.tokenizer, **common, **settings)


def _source(template: str | None) -> str | None:
    """What was named, or the text of the file that was."""
    if template is None or not template.endswith(".jinja"):
        return template
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise RequestError(f"--template {template} cannot be read: {reason}; name another file") from error
    if "{" not in text:
        raise RequestError(f"--template {template} holds no jinja; expected a chat template")
    return text


def _converse(chat: Chat, name: str, as_json: bool) -> None:
    """On a terminal: what goes wrong is said, and the chat goes on."""
    from lathe.cli.output import say

    with suppress(ImportError):  # where it is missing, lines are typed without its editing keys
        import readline  # noqa: F401 - `input` uses it once it is there
    say(f"{name}: {', '.join(f'{word} to {what}' for word, what in COMMANDS.items())}; Ctrl-C ends an answer")
    while True:
        try:
            line = _typed()
            if line is None:
                return
            if not _obeyed(chat, line):
                _show(chat.ask(line), chat, line, as_json, keep_on=True)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            say("/quit or Ctrl-D ends the chat")
        except RequestError as error:
            say(str(error))
        except EOFError:
            sys.stderr.write("\n")
            return


def _typed() -> str | None:
    """A line that was typed; None to end the chat."""
    if sys.stdout.isatty():
        line = input("> ")
    else:  # stdout holds answers only
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = input()
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{line!r} is not UTF-8; set the terminal to it") from None
    return None if line.strip() == "/quit" else line


def _piped_lines() -> Iterator[str]:
    """The messages on stdin up to `/quit`, each read when the one before was answered."""
    from lathe.text.corpus import decoded

    for line in decoded(iter(sys.stdin.buffer.readline, b""), "stdin"):
        text = line.rstrip("\r\n")
        if text.strip() == "/quit":
            return
        yield text


def _obeyed(chat: Chat, line: str) -> bool:
    """Whether the line was no message: empty, or a command, which is carried out."""
    from lathe.cli.output import say

    word = line.strip()
    if word == "/reset":
        chat.reset()
        say("the conversation is forgotten")
    elif re.fullmatch(r"/[a-z]+", word):
        unknown = "" if word == "/help" else f"there is no command {word}; "
        say(unknown + ", ".join(f"{each} to {what}" for each, what in COMMANDS.items()))
    else:
        return not word
    return True


def _show(reply: Reply, chat: Chat, message: str, as_json: bool, keep_on: bool = False) -> None:
    """Print an answer while it is written, or as one JSON line. Ctrl-C ends it; with `keep_on` that is all it does."""
    from lathe.cli.output import say

    if reply.forgotten:
        turns = "turn" if reply.forgotten == 1 else f"{reply.forgotten} turns"
        say(f"forgot the oldest {turns} to stay within the model's {chat.positions:,} positions")
    broken_off = False
    try:
        for piece in reply:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not keep_on:
            raise
        broken_off = True
    finally:
        reply.close()
    if as_json:
        answer = {
            "message": message,
            "answer": reply.text,
            "tokens": reply.tokens,
            "ended": reply.ended,
            "forgotten": reply.forgotten,
        }
        plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        sys.stdout.write(json.dumps(answer, ensure_ascii=plain))
    sys.stdout.write("\n")
    sys.stdout.flush()
    if broken_off:
        say("broken off; the conversation goes on")
    elif not reply.ended:
        say(f"the answer was cut at {reply.tokens:,} tokens; --max-new-tokens allows more")
