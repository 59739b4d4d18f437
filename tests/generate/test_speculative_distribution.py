"""With a draft, whole texts come as often as the parent alone writes them, and a biased sampler would be caught.

Every text of up to three tokens out of a vocabulary of seven is enumerated, and its probability multiplied up from
forwards without a cache and the logits processors of `transformers`. Texts are then drawn with thousands of seeds, a
row for each, with prompts of different lengths side by side, and counted: Pearson's chi-squared says whether the counts
are what the probabilities make likely.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lathe
from lathe.generate import generate, speculative
from tests.families.contract import randomise
from tests.generate.models import TWINS
from tests.generate.test_speculative import near

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

VOCABULARY, NEW, END, PAD = 7, 3, 2, 0
PROMPTS = ([5, 3, 4, 5, 3], [4, 6])
SEEDS = 1600
# How far the draft's weights are from the parent's: it should be refused at times and not always.
AWAY = {"bart": 0.1}
LIMIT = 5.0  # standard deviations; what is broken is further off

SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.5, "top_k": 4},
    {"top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.05, "temperature": 1.2},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
)


@functools.cache
def models(name: str) -> tuple[lathe.Model, lathe.Model]:
    """A parent of few tokens in float64, and a draft that disagrees with it."""
    kind, config = TWINS[name]
    stock = getattr(transformers, kind)
    tokens = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": 1}
    small = {**config, **tokens, "vocab_size": VOCABULARY, "forced_eos_token_id": None}
    torch.manual_seed(5)
    theirs = stock(stock.config_class(**small)).eval()
    randomise(theirs)
    model = lathe.load(theirs).to(torch.float64)
    return model, near(model, AWAY.get(name, 0.35))


def drawn(model: lathe.Model, draft: lathe.Model | None, **settings: Any) -> list[Tensor]:
    """The new tokens that each prompt's rows got, a row for each seed; prompts of different lengths in turn."""
    longest = max(map(len, PROMPTS))
    rows = [PROMPTS[seed % len(PROMPTS)] for seed in range(SEEDS)]
    ids = torch.full((SEEDS, longest), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        # An encoder's learned positions count pads in front of a text.
        where = slice(longest - len(row), None) if model.encoder is None else slice(0, len(row))
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    drafting: dict[str, Any] = {} if draft is None else {"draft": draft, "num_draft_tokens": 2}
    found = generate(
        model, ids, mask, max_new_tokens=NEW, do_sample=True, seed=tuple(range(SEEDS)), **drafting, **settings
    )
    first = longest if model.encoder is None else 1
    return [found[number :: len(PROMPTS), first:] for number in range(len(PROMPTS))]


@functools.cache
def expected(name: str, prompt: tuple[int, ...], number: int) -> dict[tuple[int, ...], float]:
    """The probability of every text after a prompt, under setting `number`."""
    model = models(name)[0]
    config = transformers.GenerationConfig(**{"top_k": None, **SETTINGS[number]}, do_sample=True)
    source = torch.tensor([prompt])
    before = source if model.encoder is None else torch.tensor([[1]])
    judge = STOCK._get_logits_processor(config, before.shape[1], source, device="cpu", model_kwargs={})
    reached: dict[tuple[int, ...], float] = {(): 1.0}
    found: dict[tuple[int, ...], float] = {}
    for length in range(NEW):
        texts = list(reached)
        ids = torch.cat(
            (before.expand(len(texts), -1), torch.tensor(texts, dtype=torch.long).view(len(texts), length)), 1
        )
        with torch.no_grad():
            if model.encoder is None:
                logits = model(ids).logits[:, -1]
            else:
                logits = model(source.expand(len(texts), -1), decoder_input_ids=ids).logits[:, -1]
        p = judge(ids, logits).softmax(-1).tolist()
        following = {
            (*text, token): reached[text] * p[row][token]
            for row, text in enumerate(texts)
            for token in range(VOCABULARY)
            if p[row][token] > 0
        }
        reached = {text: each for text, each in following.items() if text[-1] != END}
        found |= {text + (PAD,) * (NEW - len(text)): each for text, each in following.items() if text not in reached}
    return found | reached


# Any stock model makes the processors of a setting.
STOCK = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=END)
)


def surprise(name: str, number: int, rows: list[Tensor]) -> float:
    """How far the counts are from what is expected, in standard deviations of chi-squared, of the worse prompt.

    Texts that are expected fewer than 5 times are counted together. A text that cannot be is infinitely surprising.
    """
    worst = 0.0
    for prompt, texts in zip(PROMPTS, rows):
        wanted = expected(name, tuple(prompt), number)
        assert sum(wanted.values()) == pytest.approx(1)
        counts = dict.fromkeys(wanted, 0)
        for text in map(tuple, texts.tolist()):
            if text not in counts:
                return float("inf")
            counts[text] += 1
        scale = len(texts)
        often = [text for text, p in wanted.items() if p * scale >= 5]
        rest = scale - sum(counts[text] for text in often), scale * (1 - sum(wanted[text] for text in often))
        cells = [*((counts[text], scale * wanted[text]) for text in often), *([rest] if rest[1] > 1e-6 else [])]
        assert len(cells) > 7
        chi = sum((seen - hoped) ** 2 / hoped for seen, hoped in cells)
        worst = max(worst, abs(chi - (len(cells) - 1)) / (2 * (len(cells) - 1)) ** 0.5)
    return worst


every = pytest.mark.parametrize(("name", "number"), list(itertools.product(TWINS, range(len(SETTINGS)))))


@every
def test_texts_come_as_often_as_the_parent_alone_writes_them(name: str, number: int) -> None:
    model, draft = models(name)
    assert surprise(name, number, drawn(model, draft, **SETTINGS[number])) < LIMIT


@pytest.mark.parametrize("name", TWINS)
def test_the_parent_alone_passes_the_same_test(name: str) -> None:
    assert surprise(name, 0, drawn(models(name)[0], None, **SETTINGS[0])) < LIMIT


def always(p_BV: Tensor, q_BV: Tensor, drafted_B: Tensor, u_B3: Tensor | None) -> tuple[Tensor, Tensor]:
    """Broken: keeps what the draft says."""
    keep_B, instead_B = sound(p_BV, q_BV, drafted_B, u_B3)
    return torch.ones_like(keep_B), instead_B


def from_the_parent(p_BV: Tensor, q_BV: Tensor, drafted_B: Tensor, u_B3: Tensor | None) -> tuple[Tensor, Tensor]:
    """Broken: what comes in place of a refused token is drawn from p and not from what q left of it."""
    keep_B, _ = sound(p_BV, q_BV, drafted_B, u_B3)
    return keep_B, sound(p_BV, torch.zeros_like(q_BV), drafted_B, u_B3)[1]


sound = speculative.judge


@every
@pytest.mark.parametrize("broken", [always, from_the_parent])
def test_a_sampler_that_the_draft_biases_is_caught(
    name: str, number: int, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draft = models(name)
    monkeypatch.setattr(speculative, "judge", broken)
    assert surprise(name, number, drawn(model, draft, **SETTINGS[number])) > 2 * LIMIT
