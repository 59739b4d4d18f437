"""From text to text: prompts through a tokenizer, a model and back, whole or as it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lathe.engine import Engine
from lathe.errors import RequestError
from lathe.generate.continuous import decode_rows
from lathe.generate.decode import decode, steps
from lathe.generate.settings import Settings
from lathe.generate.single import Step
from lathe.generate.speculative import Speculation
from lathe.generate.tail import last_ids, settled
from lathe.generate.watch import Watch
from lathe.model.transformer import Transformer
from lathe.text.tokenizer import Tokenizer

_CONTEXT = 8  # ids that a token is spelled after; more would change nothing, and take time at every token


@dataclass(frozen=True)
class Completion:
    """One prompt's text.

    Args:
        prompt: as it was given.
        text: what the model added to it, or made of it where it has an encoder.
        ids: the new token ids, an end-of-sequence token included and what fills the row after it not.
        ended: whether the model or a stop string ended it, rather than the length it was given.
        log_probs: of each of the ids under the model, before temperature and any filter.
        score: their sum; for beams what the texts are ranked by.
        speculation: what a draft was good for in the whole batch; None without one.
    """

    prompt: str
    text: str
    ids: list[int]
    ended: bool
    log_probs: list[float]
    score: float
    speculation: Speculation | None = field(default=None, repr=False)


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stored: Mapping[str, Any] | None = None,
    keep_special_tokens: bool = False,
    watch: Watch | None = None,
    draft: Transformer | None = None,
    num_draft_tokens: int = 4,
    engine: str | Engine = "auto",
    **settings: Any,
) -> list[Completion]:
    """Text for each prompt, in one batch; `num_return_sequences` of them side by side, beams from the best down.

    Args:
        stored: the settings that came with the model.
        keep_special_tokens: leave `</s>`, sentinels and the like in the text.
        watch: told of each step; `lathe.generate.explain.Explanation` is one that writes it down.
        draft, num_draft_tokens: a smaller model that proposes tokens, and how many, as for `generate`.
        engine: what computes the passes, as for `generate`.
        settings: as for `lathe.generate.generate`.

    Raises:
        RequestError: no prompt, one without a token, or what `generate` refuses.
    """
    resolved, batch = _read(model, tokenizer, prompts, stored, settings)
    drafting: dict[str, Any] = {"draft": draft, "num_draft_tokens": num_draft_tokens}
    found = decode(
        model, **batch, stored=stored, tokenizer=tokenizer, watch=watch, engine=engine, **drafting, **settings
    )
    rows, log_probs = found.sequences_RT[:, found.n_prompt :].tolist(), found.log_probs_RT.tolist()
    each = resolved.num_return_sequences
    texts = []
    for number, (length, ended, score) in enumerate(
        zip(found.lengths_R.tolist(), found.ended_R.tolist(), found.scores_R.tolist())
    ):
        prompt, ids = prompts[number // each], rows[number][:length]
        before = tokenizer.encode(prompt) if model.encoder is None else []
        text = _added(tokenizer, before, ids, skip=not keep_special_tokens)
        texts.append(Completion(prompt, text, ids, ended, log_probs[number][:length], score, found.speculation))
    return texts


def complete_in_turns(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    slots: int | None = None,
    stored: Mapping[str, Any] | None = None,
    keep_special_tokens: bool = False,
    engine: str | Engine = "auto",
    **settings: Any,
) -> list[Completion]:
    """What `complete` gives for any number of prompts, `slots` rows at once: one that ends makes room for the next.

    Args and errors are `complete`'s and those of `lathe.generate.continuous.rows_as_finished`.
    """
    resolved, each = Settings.resolve(model.architecture, settings, stored), _ids(tokenizer, prompts)
    common: dict[str, Any] = {"stored": stored, "tokenizer": tokenizer, "engine": engine}
    rows = decode_rows(model, each, slots=slots, **common, **settings)
    texts = []
    for row in rows:
        number = row.number // resolved.num_return_sequences
        before = each[number] if model.encoder is None else []
        text = _added(tokenizer, before, row.ids, skip=not keep_special_tokens)
        texts.append(Completion(prompts[number], text, row.ids, row.ended, row.log_probs, row.score))
    return texts


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stored: Mapping[str, Any] | None = None,
    keep_special_tokens: bool = False,
    engine: str | Engine = "auto",
    **settings: Any,
) -> Iterator[str]:
    """The text of one prompt, piece by piece as it is chosen. The pieces add up to the text of `complete`.

    A piece is given once no later token can change it: an unfinished character is held back, and so are tokens that
    stand for single bytes, whose text is known only when another kind of token follows.

    Raises:
        RequestError: as `complete`; beams or several sequences, of which none is the text before the end.
    """
    resolved, batch = _read(model, tokenizer, [prompt], stored, settings)
    if resolved.num_beams > 1 or resolved.num_return_sequences > 1:
        raise RequestError(
            f"num_beams={resolved.num_beams}, num_return_sequences={resolved.num_return_sequences}: a text can be "
            "streamed where there is one; pass 1 for both, or do not stream"
        )
    before = tokenizer.encode(prompt) if model.encoder is None else []
    chosen = steps(model, **batch, stored=stored, tokenizer=tokenizer, engine=engine, **settings)
    yield from spelled(tokenizer, before, chosen, keep_special_tokens)


def spelled(
    tokenizer: Tokenizer, before: list[int], chosen: Iterable[Step], keep_special_tokens: bool = False
) -> Iterator[str]:
    """The text of one row's steps, piece by piece as `stream` gives it.

    Args:
        before: the ids that the row follows, which its first token may be spelled after.
    """
    ids: list[int] = []
    given = 0
    for step in chosen:
        ids.append(int(step.tokens_B[0]))
        known = settled(tokenizer, ids, skip=not keep_special_tokens)
        # An unfinished character decodes to the replacement character, which the next token may complete.
        text = _added(tokenizer, before, known, skip=not keep_special_tokens).rstrip("\ufffd")
        if len(text) > given:
            yield text[given:]
            given = len(text)
    text = _added(tokenizer, before, ids, skip=not keep_special_tokens)
    if len(text) > given:
        yield text[given:]


def _read(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    stored: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> tuple[Settings, dict[str, Any]]:
    """The settings, and the prompts as ids and a mask."""
    _ids(tokenizer, prompts)
    resolved = Settings.resolve(model.architecture, settings, stored)
    # A tokenizer without a padding token fills up with any id: the mask hides it.
    fill = (tokenizer.eos_id or 0) if tokenizer.pad_id is None else None
    batch = tokenizer(list(prompts), padding_side="left" if model.encoder is None else None, pad_id=fill)
    return resolved, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each prompt; RequestError where there is none, or one without a token."""
    if not prompts:
        raise RequestError("there is no prompt; give at least one text")
    rows = tokenizer.encode_batch(prompts)
    for number, ids in enumerate(rows, start=1):
        if is_empty(tokenizer, prompts[number - 1], ids):
            raise RequestError(f"prompt {number} is {prompts[number - 1]!r} and holds no token; expected some text")
    return rows


def is_empty(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> bool:
    """Whether a text has no token of its own: of `ids`, what it is read as, all were set around it by the tokenizer."""
    # Nothing sets more than two tokens around a text, so only short ones are looked at again.
    return not ids or (len(ids) <= 4 and not tokenizer.encode(text, add_special_tokens=False))


def _added(tokenizer: Tokenizer, before: list[int], new: list[int], *, skip: bool) -> str:
    """The text of the new ids as it reads after the old ones: a first token may begin with a space."""
    before = last_ids(tokenizer, before, _CONTEXT, skip=skip)
    # The model's table may have more rows than the vocabulary has tokens.
    old, whole = (tokenizer.decode(ids, skip, errors="replace") for ids in (before, before + new))
    return whole[len(old) :] if whole.startswith(old) else tokenizer.decode(new, skip, errors="replace")
