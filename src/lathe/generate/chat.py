"""A conversation with a model: the template makes its turns one prompt, and the model's answer becomes a turn.

The prompt grows with every turn, and the model's positions do not. Where both the prompt and the longest answer
that was asked for no longer fit, the oldest turns (a message with its answer) are forgotten, one after the other;
the system message stays. So the model never reads past what it was made for.

An answer ends where the template would go on: with the token that it writes after an answer (`</s>`, `<|eot_id|>`,
`<|im_end|>`), found by rendering a conversation and looking; if it writes none, with the text that it opens the next
message with. An end-of-sequence token ends it too.

Every turn reads its whole prompt again. What an answer's tokens spell is not always cut into the same tokens when it
is rendered as history, and once turns are forgotten nothing of a cache would hold, so none is carried over.

An encoder-decoder chats as well, if a template is named: its encoder reads the conversation, with the special tokens
that it is used to, and its decoder writes the answer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from lathe.engine import Engine
from lathe.engine.choose import reader
from lathe.errors import RequestError
from lathe.generate.decode import steps
from lathe.generate.settings import Settings
from lathe.generate.single import Step
from lathe.generate.text import spelled
from lathe.model.transformer import Transformer
from lathe.text.tokenizer import Tokenizer

DEFAULT_ANSWER = 512
# A message and an answer to find in a rendered conversation.
_ANSWER, _MESSAGE = "Lathe-answer", "Lathe-message"


class Chat:
    """A conversation.

    Args:
        model: a decoder or an encoder-decoder with a language head.
        template: as for `Tokenizer.chat_template`.
        system: what stands in front of the conversation and is never forgotten.
        stored: the settings that came with the model.
        engine: what computes, as for `lathe.generate.generate`.
        settings: as for `lathe.generate.generate`, one sequence and no beams. `max_new_tokens` is what an answer may
            have at most (512, or half of the model's positions if that is less); a `seed` is the first answer's, and
            the next answer's is one more.

    Raises:
        RequestError: a model that cannot generate, no template, one without a place for the system message, or
            settings that cannot be.

    >>> import lathe
    >>> from lathe.generate.chat import Chat
    >>> from lathe.text import train_tokenizer
    >>> tokenizer = train_tokenizer(["to be or not to be that is the question"] * 9, 270, convention="gpt2")
    >>> tiny = lathe.preset("gpt2").with_(d_model=16, d_ff=32, n_layers=1, n_heads=2, d_head=8, vocab_size=270)
    >>> model = lathe.Model(tiny.with_({"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id}), seed=0)
    >>> chat = Chat(model, tokenizer, template="vicuna", max_new_tokens=4)
    >>> reply = chat.ask("to be?")
    >>> "".join(reply).strip() == reply.text, reply.tokens
    (True, 4)
    >>> [message["role"] for message in chat.messages]
    ['user', 'assistant']
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        template: str | None = None,
        system: str | None = None,
        stored: Mapping[str, Any] | None = None,
        engine: str | Engine = "auto",
        **settings: Any,
    ) -> None:
        decoder = model.architecture.decoder
        if decoder is None or model.architecture.head.language is None:
            raise RequestError("this model does not write text and cannot chat; expected one with a language head")
        self.model, self.tokenizer, self._engine = model, tokenizer, engine
        reader(model, engine)  # refuses what is no engine before anything is said
        self.source = tokenizer.chat_template(template)
        self.system: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[tuple[str, str]] = []
        self.answers = 0
        reads = decoder if model.architecture.encoder is None else model.architecture.encoder
        self.positions = reads.positions.max_positions
        self.max_new = _longest_answer(settings, stored or {}, self.positions)
        self._settings = {**settings, "max_new_tokens": self.max_new}
        self._stored = dict(stored or {})
        resolved = Settings.resolve(model.architecture, self._settings, self._stored)
        for name in ("num_beams", "num_return_sequences"):
            if getattr(resolved, name) > 1:
                raise RequestError(f"{name}={getattr(resolved, name)}: a chat has one answer at a time; pass {name}=1")
        if not (resolved.seed is None or isinstance(resolved.seed, int)):
            raise RequestError(f"seed={list(resolved.seed)}: a chat has one row; pass one number")
        self._seed = resolved.seed
        self._refuse_unread_system()
        end, self.stops = self._end_of_turn()
        self._settings["eos_token_id"] = tuple(dict.fromkeys([*resolved.eos_token_id, *end]))
        self._settings["stop_strings"] = (*(resolved.stop_strings or ()), *self.stops) or None

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model will read before the next message."""
        return [*self.system, *_as_messages(self.turns)]

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.turns.clear()

    def ask(self, message: str) -> Reply:
        """The answer to a message, which is written while the reply is iterated over.

        Raises:
            RequestError: a message that is empty, or too long even without any history.
        """
        if not message.strip():
            raise RequestError("the message is empty; say something")
        for forgotten in range(len(self.turns) + 1):
            ids = self._prompt(self.turns[forgotten:], message)
            if self._room is None or len(ids) <= self._room:
                self.turns = self.turns[forgotten:]
                return Reply(self, message, ids, forgotten)
        raise RequestError(
            f"the message is {len(ids):,} tokens with what the template and the system message add, and "
            f"{max(0, self._room or 0):,} fit beside an answer of {self.max_new:,} in the model's {self.positions:,} "
            "positions; shorten it, or lower max_new_tokens"
        )

    @property
    def _room(self) -> int | None:
        """How many tokens a prompt may have; None where there is no limit."""
        if self.positions is None or self.model.encoder is not None:
            return self.positions
        return self.positions - self.max_new + 1  # the last new token is never read

    def _render(self, messages: list[dict[str, str]], prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=self.source, add_generation_prompt=prompt
        )

    def _prompt(self, turns: list[tuple[str, str]], message: str) -> list[int]:
        messages = [*self.system, *_as_messages(turns), {"role": "user", "content": message}]
        # A decoder's template writes every special token itself; an encoder was not trained with templates.
        return self.tokenizer.encode(self._render(messages), add_special_tokens=self.model.encoder is not None)

    def _refuse_unread_system(self) -> None:
        text = self._render([*self.system, {"role": "user", "content": _MESSAGE}])
        if _MESSAGE not in text:
            raise RequestError("the chat template leaves out what the user says; name another one")
        if self.system and self.system[0]["content"].strip() not in text:
            raise RequestError("the chat template has no place for a system message; leave it out")

    def _end_of_turn(self) -> tuple[list[int], tuple[str, ...]]:
        """What the template ends an answer with: a token's id, or the text that opens the next message."""
        text = self._render(_as_messages([(_MESSAGE, _ANSWER), (_MESSAGE, "")])[:3], prompt=False)
        head, _, rest = text.rpartition(_ANSWER)
        self._opens_line = head.endswith("\n")
        whole = rest.rpartition(_MESSAGE)[0]
        after = whole.strip()
        known = {token.content for token in self.tokenizer.engine.get_added_tokens_decoder().values()}
        known |= set(self.tokenizer.settings.roles.values())
        marks = [token for token in known if after.startswith(token)]
        number = self.tokenizer.token_id(max(marks, key=len)) if marks else None
        if number is not None and number < self.model.architecture.embedding.vocab_size:
            return [number], ()
        # Where the next message stands on a line of its own, its opening ends an answer there alone: `Q`, `>` and
        # `user:` are in many a sentence.
        line = "\n" if "\n" in whole[: len(whole) - len(whole.lstrip())] else ""
        return [], (line + after,) if after else ()

    def _chosen(self, ids: list[int]) -> Iterator[Step]:
        ids_1T = torch.tensor([ids])
        # Answers to the same question differ, and the same seed still gives the same conversation.
        seeded = {} if self._seed is None else {"seed": self._seed + self.answers}
        self.answers += 1
        return steps(
            self.model,
            ids_1T,
            torch.ones_like(ids_1T),
            stored=self._stored,
            tokenizer=self.tokenizer,
            engine=self._engine,
            **{**self._settings, **seeded},
        )


class Reply:
    """One answer. Iterating over it writes it, piece by piece; what was written by then becomes part of the history.

    Attributes:
        forgotten: how many turns were dropped to make room for it.
        text: the answer so far, without white space around it.
        tokens: how many tokens it has so far, the one that ends it included.
        ended: whether the model ended it, rather than the length.
    """

    def __init__(self, chat: Chat, message: str, ids: list[int], forgotten: int) -> None:
        self.forgotten = forgotten
        self.text, self.tokens, self.ended = "", 0, False
        self._pieces = self._write(chat, message, ids)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """End the answer where it is."""
        self._pieces.close()

    def _write(self, chat: Chat, message: str, ids: list[int]) -> Generator[str, None, None]:
        before = ids if chat.model.encoder is None else []
        written = ""
        try:
            said = spelled(chat.tokenizer, before, self._counted(chat._chosen(ids)))
            # For a stop text that opens a line: the break before the answer's first, which is not shown.
            for piece in without(chain(["\n"] if chat._opens_line else [], said), chat.stops):
                shown = piece if written else piece.lstrip()
                written += shown
                self.text = written.strip()
                if shown:
                    yield shown
            # What ended before its length was ended: at the latest by a stop text that only the history makes one.
            self.ended = self.ended or self.tokens < chat.max_new
        finally:  # an answer that was broken off was read by the user as well
            if self.tokens:
                chat.turns.append((message, self.text))

    def _counted(self, chosen: Iterable[Step]) -> Iterator[Step]:
        for step in chosen:
            self.tokens += 1
            self.ended = bool(step.ended_B[0])
            yield step


def without(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The pieces of a text up to the first of some texts; what may be the beginning of one is held back.

    Nothing more is asked of `pieces` after that.
    """
    held = ""
    for piece in pieces:
        held += piece
        at = min((held.find(stop) for stop in stops if stop in held), default=-1)
        safe = at if at >= 0 else len(held) - max((_begun(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
        if at >= 0:
            return
        held = held[safe:]
    if held:
        yield held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]


def _longest_answer(settings: Mapping[str, Any], stored: Mapping[str, Any], positions: int | None) -> int:
    if settings.get("max_length") is not None:
        raise RequestError(
            f"max_length={settings['max_length']}: a chat's prompts grow; pass max_new_tokens, for each answer"
        )
    asked = settings.get("max_new_tokens")
    if asked is None:
        asked = stored.get("max_new_tokens")
    if asked is None:
        return DEFAULT_ANSWER if positions is None else max(1, min(DEFAULT_ANSWER, positions // 2))
    if isinstance(asked, int) and positions is not None and asked >= positions:
        raise RequestError(
            f"max_new_tokens={asked:,}: the model has {positions:,} positions for the conversation and the answer; "
            "ask for less"
        )
    return int(asked) if isinstance(asked, int | float) and int(asked) == asked else asked
