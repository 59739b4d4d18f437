"""Chat templates: a conversation becomes the text that a model was trained on.

A chat model has seen each turn between marks of its own. A template, a small jinja program that travels with the
tokenizer, writes them: it reads `messages` (each a role and a content) and, with `add_generation_prompt`, ends
where an answer begins. It comes from whoever published the model, so it runs in jinja's sandbox, which lets it
read what it is given and nothing else. The environment is that of `transformers`, so one template means one text.

Where a template stands: `chat_template.jinja` and `additional_chat_templates/*.jinja`, or under `chat_template` in
`tokenizer_config.json`, as one text or a list of named ones; the files go before the setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from lathe.errors import RequestError
from lathe.text import files as names

if TYPE_CHECKING:
    import jinja2

DEFAULT = "default"

# What a template's own mistakes, or messages that it does not expect, can raise besides jinja's errors.
_FAULTS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def stored_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """The templates among a tokenizer's files, by name; the one without a name is `default`.

    Raises:
        RequestError: a template that is not UTF-8, or a setting of the wrong kind.
    """
    found = {}
    for name, data in files.items():
        path = PurePosixPath(name)
        if name == names.CHAT_TEMPLATE or (path.parent.name == names.TEMPLATES and path.suffix == ".jinja"):
            try:
                found[DEFAULT if name == names.CHAT_TEMPLATE else path.stem] = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RequestError(f"{name} is not UTF-8 ({error.reason}): copy or download it again") from error
    return found or _in_settings(names.read_json(files, names.CONFIG).get("chat_template"))


def _in_settings(setting: Any) -> dict[str, str]:
    if setting is None:
        return {}
    if isinstance(setting, str):
        return {DEFAULT: setting}
    if isinstance(setting, list):
        try:
            found = {each["name"]: each["template"] for each in setting}
        except (TypeError, KeyError):
            found = {"": None}
        if all(isinstance(text, str) for pair in found.items() for text in pair):
            return found
    raise RequestError(
        f"{names.CONFIG} holds a chat_template that is neither a text nor a list of names and templates: "
        "copy or download it again"
    )


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that a template makes of a conversation.

    Args:
        source: the template, in jinja.
        messages: each a map with a `role` and whatever the template reads, `content` above all; keys that are None
            are left out, as `transformers` does.
        tokens: `bos_token`, `eos_token` and so on, as texts.
        add_generation_prompt: end where an answer begins.
        variables: what else the template reads, such as `enable_thinking`.

    Raises:
        RequestError: no messages or something else, a template that is not jinja, one that refuses the messages,
            or a variable that it does not read.
    """
    template, reads = _compiled(source)
    given = dict(variables or {})
    unread = sorted(set(given) - reads)
    if unread:
        raise RequestError(
            f"{unread[0]}: the chat template reads no such variable; it reads {', '.join(sorted(reads))}"
        )
    import jinja2

    try:
        return template.render(
            messages=_conversation(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**tokens, **{name: _plain(name, value) for name, value in given.items()}},
        )
    except (jinja2.TemplateError, *_FAULTS) as error:
        if isinstance(error, RequestError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"the chat template does not take these messages: {reason}") from error


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            f"messages={messages!r:.60}: expected a list of at least one message, each with a role and a content"
        )
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"message {number} is {message!r:.60}: expected a map with a role and a content, "
                "as {'role': 'user', 'content': 'Hello'}"
            )
        where = f"message {number}"
        found.append({key: _plain(where, value) for key, value in message.items() if value is not None})
    return found


def _plain(where: str, value: Any) -> Any:
    """A copy made of what JSON has: an object with methods of its own would reach out of the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(where, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(where, item) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}: expected text, numbers, lists and maps")


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template, and the names of what it reads."""
    import jinja2
    import jinja2.meta

    environment = _environment()
    try:
        reads = jinja2.meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), frozenset(reads - set(environment.globals))
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"the chat template is not jinja that can be run: {reason}") from error


def _environment() -> jinja2.Environment:
    """The sandbox with what `transformers` gives a template: no HTML escapes, loop controls, the date."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}` marks what a model writes, for training; here its body is all."""

        tags = {"generation"}  # noqa: RUF012 - as jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # What is set in it is gone after it, as in `transformers`, which calls it like a macro.
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment
