"""With a draft: the parent's greedy text, the parent's distribution, and rows that do not know of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lathe
from lathe.errors import RequestError
from lathe.generate import decode, generate, speculative
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


def sampled(model: lathe.Model, draft: lathe.Model | None, rows: int, **settings: Any) -> Tensor:
    """Two new tokens of `rows` texts, drawn after one prompt, as one number each."""
    found = generate(
        model,
        torch.tensor([[5, 9, 11]]),
        max_new_tokens=2,
        eos_token_id=None,
        do_sample=True,
        seed=17,
        num_return_sequences=rows,
        draft=draft,
        **settings,
    )[:, -2:]
    return found[:, 0] * VOCABULARY + found[:, 1]


def surprise(model: lathe.Model, drawn: Tensor, **settings: Any) -> float:
    """Pearson's chi-squared of pairs of tokens against the exact distribution, in standard deviations from its mean.

    Pairs expected fewer than 5 times are counted together.
    """
    n = len(drawn)
    first = _filtered(model, torch.tensor([[5, 9, 11]]), **settings)[0]
    after = torch.cat((torch.tensor([[5, 9, 11]]).expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]), dim=1)
    expected = n * (first[:, None] * _filtered(model, after, **settings)).flatten()
    counts = torch.bincount(drawn, minlength=VOCABULARY**2).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    seen = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    degrees = len(wanted) - 1
    return float((((seen - wanted) ** 2 / wanted).sum() - degrees) / (2 * degrees) ** 0.5)


def _filtered(model: lathe.Model, ids: Tensor, **settings: Any) -> Tensor:
    """What temperature and top-k leave of the next token's distribution, written out again."""
    logits = model(ids).logits[:, -1].detach().double() / settings.get("temperature", 1.0)
    least = logits.topk(settings["top_k"]).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


SAMPLING = {"temperature": 1.5, "top_k": 8}
LIMIT = 5.0


@pytest.fixture(scope="module")
def distributions() -> tuple[lathe.Model, lathe.Model]:
    model = sampler("gpt2")
    return model, near(model, 0.15)


def test_samples_have_the_parents_distribution(distributions: tuple[lathe.Model, lathe.Model]) -> None:
    model, draft = distributions
    assert abs(surprise(model, sampled(model, None, 4000, **SAMPLING), **SAMPLING)) < LIMIT
    assert abs(surprise(model, sampled(model, draft, 4000, **SAMPLING), **SAMPLING)) < LIMIT


def always(p_BV: Tensor, q_BV: Tensor, drafted_B: Tensor, u_B3: Tensor | None) -> tuple[Tensor, Tensor]:
    """Broken: keeps what the draft says."""
    keep_B, instead_B = speculative_judge(p_BV, q_BV, drafted_B, u_B3)
    return torch.ones_like(keep_B), instead_B


def from_the_parent(p_BV: Tensor, q_BV: Tensor, drafted_B: Tensor, u_B3: Tensor | None) -> tuple[Tensor, Tensor]:
    """Broken: what comes in place of a refused token is drawn from p and not from what q left of it."""
    keep_B, _ = speculative_judge(p_BV, q_BV, drafted_B, u_B3)
    return keep_B, speculative_judge(p_BV, torch.zeros_like(q_BV), drafted_B, u_B3)[1]


speculative_judge = speculative.judge


@pytest.mark.parametrize("broken", [always, from_the_parent])
def test_a_sampler_that_the_draft_biases_would_be_caught(
    distributions: tuple[lathe.Model, lathe.Model], broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draft = distributions
    monkeypatch.setattr(speculative, "judge", broken)
    drawn = sampled(model, draft, 4000, **SAMPLING)
    counted = torch.bincount(drawn // VOCABULARY, minlength=VOCABULARY).double()
    first = _filtered(model, torch.tensor([[5, 9, 11]]), **SAMPLING)[0] * 4000
    assert float(((counted - first)[first > 0] ** 2 / first[first > 0]).sum()) > 100  # of 7 degrees of freedom


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
