"""From text to text: prompts through a tokenizer, a model and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lathe.errors import RequestError
from lathe.generate.decode import generate
from lathe.generate.settings import Settings
from lathe.model.transformer import Transformer
from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One prompt's text.

    Args:
        prompt: as it was given.
        text: what the model added to it, or made of it where it has an encoder.
        ids: the new token ids, an end-of-sequence token included and what fills the row after it not.
        ended: whether the model ended it, rather than the length it was given.
    """

    prompt: str
    text: str
    ids: list[int]
    ended: bool


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stored: Mapping[str, Any] | None = None,
    keep_special_tokens: bool = False,
    **settings: Any,
) -> list[Completion]:
    """Text for each prompt, in one batch; `num_return_sequences` of them side by side.

    Args:
        stored: the settings that came with the model.
        keep_special_tokens: leave `</s>`, sentinels and the like in the text.
        settings: as for `lathe.generate.generate`.

    Raises:
        RequestError: no prompt, one without a token, or what `generate` refuses.
    """
    if not prompts:
        raise RequestError("there is no prompt; give at least one text")
    for number, ids in enumerate(tokenizer.encode_batch(prompts), start=1):
        if not ids:
            raise RequestError(f"prompt {number} is {prompts[number - 1]!r} and holds no token; expected some text")
    resolved = Settings.resolve(model.architecture, settings, stored)
    # A tokenizer without a padding token fills up with any id: the mask hides it.
    fill = (tokenizer.eos_id or 0) if tokenizer.pad_id is None else None
    batch = tokenizer(list(prompts), padding_side="left" if model.encoder is None else None, pad_id=fill)
    rows = generate(model, batch["input_ids"], batch["attention_mask"], stored=stored, **settings).tolist()
    n_prompt = batch["input_ids"].shape[1] if model.encoder is None else 1
    found = []
    for number, row in enumerate(rows):
        which = number // resolved.num_return_sequences
        ids, ended = _until_end(row[n_prompt:], resolved.eos_token_id)
        before = tokenizer.encode(prompts[which]) if model.encoder is None else []
        text = _added(tokenizer, before, ids, skip=not keep_special_tokens)
        found.append(Completion(prompts[which], text, ids, ended))
    return found


def _until_end(ids: list[int], ends: tuple[int, ...]) -> tuple[list[int], bool]:
    at = next((place for place, each in enumerate(ids) if each in ends), None)
    return (ids, False) if at is None else (ids[: at + 1], True)


def _added(tokenizer: Tokenizer, before: list[int], new: list[int], *, skip: bool) -> str:
    """The text of the new ids as it reads after the old ones: a first token may begin with a space."""
    # The model's table may have more rows than the vocabulary has tokens.
    old, whole = (tokenizer.decode(ids, skip, errors="replace") for ids in (before, before + new))
    return whole[len(old) :] if whole.startswith(old) else tokenizer.decode(new, skip, errors="replace")
