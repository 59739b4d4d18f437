"""A few sentences that the model has never read, with a blank for it to fill or an end for it to write.

What is asked follows from the stacks: an encoder-decoder fills a span, an encoder alone fills single tokens, and
a decoder alone goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lathe.api.model import Model
from lathe.text.tokenizer import Tokenizer

_EXAMPLES = 4
_WORDS = (12, 26)  # a sentence with fewer says too little, one with more does not fit a line
_BLANK = "____"


@dataclass(frozen=True)
class Example:
    """What was shown, what stood there, and what each model wrote."""

    shown: str
    truth: str
    answers: dict[str, str]


def examples(documents: Sequence[str], models: Mapping[str, Model]) -> list[Example]:
    """Some sentences of `documents`, evenly spread, and what each model makes of them."""
    sentences = [s for text in documents for line in text.splitlines() for s in line.split(". ") if _fits(s)]
    picked = sentences[:: max(len(sentences) // _EXAMPLES, 1)][:_EXAMPLES]
    first = next(iter(models.values()))
    ask = _continue if first.encoder is None else _one_token if first.decoder is None else _span
    return [_on_one_line(ask(sentence, models)) for sentence in picked]


def _on_one_line(example: Example) -> Example:
    answers = {name: " ".join(text.split()) for name, text in example.answers.items()}
    return Example(example.shown, example.truth, answers)


def _fits(sentence: str) -> bool:
    words = sentence.split()
    plain = all(word.strip("'\"(),.:;").replace("-", "").isalpha() for word in words)
    return plain and _WORDS[0] <= len(words) <= _WORDS[1]


def _span(sentence: str, models: Mapping[str, Model]) -> Example:
    words = sentence.split()
    start = len(words) // 2
    before, gap, after = words[:start], words[start : start + 2], words[start + 2 :]
    answers: dict[str, str] = {}
    for name, model in models.items():
        tokenizer = _tokenizer(model)
        first, second = tokenizer.sentinels[:2]
        left = tokenizer.encode(" ".join(before), add_special_tokens=False)
        right = tokenizer.encode(" ".join(after), add_special_tokens=False)
        ids = torch.tensor([[*left, first, *right, tokenizer.eos_id]])
        out = model.generate(ids, max_new_tokens=12)[0].tolist()
        out = out[out.index(first) + 1 :] if first in out else out
        ends = [out.index(each) for each in (second, tokenizer.eos_id) if each in out]
        answers[name] = tokenizer.decode(out[: min(ends)] if ends else out)
    return Example(" ".join([*before, _BLANK, *after]), " ".join(gap), answers)


def _one_token(sentence: str, models: Mapping[str, Model]) -> Example:
    tokenizer = _tokenizer(next(iter(models.values())))
    ids = tokenizer.encode(sentence)
    place = len(ids) // 2
    hidden = [*ids[:place], tokenizer.mask_id, *ids[place + 1 :]]
    answers: dict[str, str] = {}
    for name, model in models.items():
        with torch.no_grad():
            logits = model(torch.tensor([hidden])).logits[0, place]
        answers[name] = ", ".join(tokenizer.decode([int(i)]).strip() for i in logits.topk(3).indices)
    shown = f"{tokenizer.decode(ids[:place])} {_BLANK} {tokenizer.decode(ids[place + 1 :])}".strip()
    return Example(shown, tokenizer.decode([ids[place]]).strip(), answers)


def _continue(sentence: str, models: Mapping[str, Model]) -> Example:
    words = sentence.split()
    half = len(words) // 2
    answers: dict[str, str] = {}
    for name, model in models.items():
        tokenizer = _tokenizer(model)
        prompt = tokenizer.encode(" ".join(words[:half]), add_special_tokens=False)
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = torch.tensor([[*start, *prompt]])
        out = model.generate(ids, max_new_tokens=16)[0, ids.shape[1] :]
        answers[name] = tokenizer.decode(out.tolist()).strip()
    return Example(" ".join(words[:half]) + " …", " ".join(words[half:]), answers)


def _tokenizer(model: Model) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer
