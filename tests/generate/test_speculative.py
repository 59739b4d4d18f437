"""With a draft: the parent's greedy text, and rows that do not know of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.generate import decode, generate
from lathe.generate.stops import StopStrings
from lathe.text import train_tokenizer
from tests.generate.models import VOCABULARY, random_model, sampler
from tests.generate.test_decode import prompts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NEW = 12


def near(model: lathe.Model, amount: float) -> lathe.Model:
    """A copy with disturbed weights: it agrees with the model sometimes."""
    copy = lathe.Model(model.architecture, seed=0).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + amount * torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype))
    return copy


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5", "bart"])
def pair(request: pytest.FixtureRequest) -> tuple[lathe.Model, lathe.Model]:
    model = sampler(request.param)
    return model, near(model, 0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_draft_tokens": 1},
        {"num_draft_tokens": 30},
        {"eos_token_id": None, "forced_eos_token_id": None},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "forced_eos_token_id": 9},
        {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2, "suppress_tokens": [7, 8]},
    ],
    ids=str,
)
def test_greedy_text_is_the_parents(pair: tuple[lathe.Model, lathe.Model], settings: dict[str, Any]) -> None:
    model, draft = pair
    batch: dict[str, Any] = {**prompts(model.architecture)}
    plain = {name: value for name, value in settings.items() if name != "num_draft_tokens"}
    expected = decode(model, **batch, max_new_tokens=NEW, **plain)
    found = decode(model, **batch, draft=draft, max_new_tokens=NEW, **settings)
    assert torch.equal(found.sequences_RT, expected.sequences_RT)
    assert torch.equal(found.lengths_R, expected.lengths_R)
    assert torch.equal(found.ended_R, expected.ended_R)
    torch.testing.assert_close(found.log_probs_RT, expected.log_probs_RT, rtol=1e-4, atol=1e-5)


def test_every_row_ends_at_its_own_end_and_keeps_its_own_number_of_tokens() -> None:
    model = sampler("gpt2")
    draft = near(model, 0.05)
    batch: dict[str, Any] = {**prompts(model.architecture)}
    free = generate(model, **batch, max_new_tokens=NEW, eos_token_id=None)
    end = int(free[1, -NEW + 4])
    expected = decode(model, **batch, max_new_tokens=NEW, eos_token_id=end)
    found = decode(model, **batch, draft=draft, max_new_tokens=NEW, eos_token_id=end)
    assert torch.equal(found.sequences_RT, expected.sequences_RT)
    assert torch.equal(found.ended_R, expected.ended_R)
    assert found.speculation is not None
    assert bool((found.speculation.accepted_R <= found.speculation.proposed_R).all())


def test_the_model_as_its_own_draft_is_never_refused() -> None:
    model = sampler("llama")
    how: tuple[dict[str, Any], ...] = ({}, {"do_sample": True, "seed": 3, "temperature": 1.3, "top_p": 0.9})
    for settings in how:
        batch: dict[str, Any] = {**prompts(model.architecture)}
        found = decode(
            model, **batch, draft=model, eos_token_id=None, max_new_tokens=11, num_draft_tokens=4, **settings
        )
        assert found.speculation is not None
        assert found.speculation.acceptance == 1
        # 4 kept and one of the parent's: 5 + 5 + 1.
        assert found.speculation.passes == 3


@pytest.mark.parametrize("sampled", [False, True])
def test_stop_strings_end_a_row_where_they_do_without_a_draft(sampled: bool) -> None:
    """Anywhere in a drafted run: what was drafted behind the end is no part of the text."""
    tokenizer = train_tokenizer(["to be or not to be that is the question"] * 20, 270, convention="gpt2")
    sizes = {"vocab_size": 270, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens: dict[str, Any] = {"tokens.eos": [], "tokens.bos": None}
    model = lathe.Model(lathe.preset("gpt2").with_({**sizes, **tokens}), seed=1, tokenizer=tokenizer).to(torch.float64)
    ids, mask = torch.tensor([[0, 5, 9], [40, 41, 42]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    half = [token for token in range(270) if "\ufffd" in tokenizer.decode([token], errors="replace")]
    how: dict[str, Any] = {"max_new_tokens": NEW, "attention_mask": mask, "suppress_tokens": half}
    if sampled:
        how |= {"do_sample": True, "seed": 2}
    free = decode(model, ids, **how)
    written = [tokenizer.decode(row, errors="replace") for row in free.sequences_RT[:, 3:].tolist()]
    for at in (2, 5):
        stop = next(text for text in (written[0][at : at + 2], written[0][at:]) if "\ufffd" not in text)
        plain = decode(model, ids, **how, stop_strings=[stop])
        # The model as its own draft draws other texts than alone, of the same distribution, so those are held apart.
        for draft in (near(model, 0.05), model):
            found = decode(model, ids, **how, stop_strings=[stop], draft=draft, num_draft_tokens=5)
            if not sampled:
                assert torch.equal(found.sequences_RT, plain.sequences_RT)
                assert torch.equal(found.ended_R, plain.ended_R)
            for row, n in enumerate(found.lengths_R.tolist()):
                new = found.sequences_RT[row, 3 : 3 + n].tolist()
                # It ends with the token that completes the text and with no earlier one.
                ends = StopStrings(tokenizer, [stop])
                done = [ends.completed([*ids[row, 1 - row :].tolist(), *new[: k + 1]]) is not None for k in range(n)]
                assert done == [False] * (n - 1) + [bool(found.ended_R[row])]
        assert bool(plain.ended_R.any())


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.8}, {"min_p": 0.1, "repetition_penalty": 1.3}, {"typical_p": 0.9, "temperature": 0.7}]
)
def test_a_row_is_the_same_alone_and_among_others(
    pair: tuple[lathe.Model, lathe.Model], settings: dict[str, Any]
) -> None:
    model, draft = pair
    batch: dict[str, Any] = {**prompts(model.architecture)}
    common: dict[str, Any] = {
        "draft": draft,
        "max_new_tokens": NEW,
        "do_sample": True,
        "num_return_sequences": 2,
        **settings,
    }
    together = decode(model, **batch, seed=[4, 5, 6], **common)
    for row, seed in enumerate((4, 5, 6)):
        alone = decode(model, **{name: each[row : row + 1] for name, each in batch.items()}, seed=[seed], **common)
        for copy in range(2):
            n = int(alone.lengths_R[copy])
            assert int(together.lengths_R[2 * row + copy]) == n
            ours, theirs = (each.sequences_RT[:, each.n_prompt :] for each in (together, alone))
            assert torch.equal(ours[2 * row + copy, :n], theirs[copy, :n])


def test_what_cannot_be_drafted_is_refused() -> None:
    model = sampler("gpt2")
    ids = torch.tensor([[5, 6]])
    other = random_model(model.architecture.with_({"embedding.vocab_size": VOCABULARY + 3}))
    refused: tuple[tuple[str, dict[str, Any]], ...] = (
        ("vocabulary of 64 tokens and the model one of 61", {"draft": other}),
        ("the draft is an encoder-decoder", {"draft": sampler("t5")}),
        ("num_beams=2 with a draft", {"draft": model, "num_beams": 2}),
        ("num_draft_tokens=0", {"draft": model, "num_draft_tokens": 0}),
    )
    for wanted, settings in refused:
        with pytest.raises(RequestError, match=wanted):
            generate(model, ids, **settings)


def test_a_settings_dead_end_is_said_as_without_a_draft() -> None:
    model = sampler("gpt2")
    banned: dict[str, Any] = {"suppress_tokens": list(range(VOCABULARY))}
    with pytest.raises(RequestError, match="no token to choose as new token 1"):
        generate(model, torch.tensor([[5, 6]]), draft=model, **banned)
