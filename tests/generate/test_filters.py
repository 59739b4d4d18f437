"""Every filter alone and with any others, against the processors that `transformers` makes of the same settings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from lathe.generate.filters import pipeline, temperature
from lathe.generate.history import History
from lathe.generate.prompt import Prompt
from lathe.generate.settings import Settings
from tests.generate.models import twins

VOCABULARY, PAD, ENDS = 40, 39, (4, 7)
GPT2 = twins("gpt2")[0]

# A value that bites for each setting, and with which mode it goes.
SAMPLERS: dict[str, list[Any]] = {
    "temperature": [0.05, 0.7, 3.0],
    "top_k": [1, 2, 7, 39, 500],
    "top_p": [1e-6, 0.1, 0.5, 0.9, 0.999],
    "min_p": [0.0, 0.02, 0.3, 1.0],
    "typical_p": [1e-6, 0.2, 0.6, 0.95],
    "epsilon_cutoff": [1e-4, 0.02, 0.3, 0.9],
    "eta_cutoff": [1e-4, 0.02, 0.3, 0.9],
}
PROCESSORS: dict[str, list[Any]] = {
    "repetition_penalty": [0.5, 1.3, 5.0],
    "encoder_repetition_penalty": [0.5, 1.3, 5.0],
    "no_repeat_ngram_size": [1, 2, 3],
    "encoder_no_repeat_ngram_size": [1, 2, 3],
    "bad_words_ids": [[[3], [5, 6]], [[4], [1, 2, 3], [2]]],
    "min_new_tokens": [2, 5],
    "min_length": [5, 8],
    "forced_bos_token_id": [9],
    "forced_eos_token_id": [9, [9, 10]],
    "begin_suppress_tokens": [[1, 2, 11]],
    "renormalize_logits": [True],
}

chosen = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in {**SAMPLERS, **PROCESSORS}.items()}
)


def logits(seed: int, rows: int = 3, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def history(seed: int = 0, *, new: int = 0, prompt: int = 3, max_new: int = 6, tokens: int = 6) -> History:
    """Rows with pads in front of none, one and two, out of few enough tokens that runs come twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, tokens, (3, prompt), generator=generator)
    pads = torch.tensor([0, 1, 2]).clamp(max=prompt - 1)
    mask = (torch.arange(prompt) >= pads[:, None]).long()
    source = Prompt(torch.randint(1, tokens, (3, 7), generator=generator), torch.ones(3, 7, dtype=torch.long))
    at = History.of(Prompt(ids.masked_fill(mask == 0, PAD), mask), prompt, max_new, source)
    for _ in range(new):
        at.append(torch.randint(1, tokens, (3,), generator=generator))
    return at


def filtered(x: Tensor, at: History, **given: Any) -> Tensor:
    for change in pipeline(Settings.from_dict(given)):
        x = change(x, at)
    return x


def theirs(x: Tensor, at: History, **given: Any) -> Tensor:
    """What `transformers` makes of the logits with the same settings."""
    config = GenerationConfig(**{"top_k": None, **given}, max_length=at.columns + at.max_new)
    config._eos_token_tensor = torch.tensor(ENDS)
    stock = GPT2._get_logits_processor(
        config, at.columns, at.source.ids_BT, device="cpu", model_kwargs={"attention_mask": at.mask_BT.long()}
    )
    return stock(at.ids_BT, x)


def check(given: dict[str, Any], seed: int, new: int, prompt: int, spread: float, beams: int) -> None:
    x, at = logits(seed, spread=spread), history(seed, new=new, prompt=prompt)
    # `transformers` counts pads as text, which shows in the pad's own logit alone; nobody may choose it here.
    whole = {**given, "do_sample": any(name in SAMPLERS for name in given), "num_beams": beams}
    whole |= {"suppress_tokens": [PAD], "eos_token_id": list(ENDS)}
    ours = filtered(x, at, **{"top_k": None, **whole})
    expected = theirs(x, at, **whole)
    assert torch.equal(ours.isneginf(), expected.isneginf())
    torch.testing.assert_close(ours.softmax(-1).nan_to_num(0.0), expected.softmax(-1).nan_to_num(0.0))


places = {
    "seed": st.integers(0, 10**6),
    "new": st.integers(0, 5),
    "prompt": st.integers(1, 4),
    "spread": st.sampled_from([0.01, 1.0, 30.0]),
    "beams": st.sampled_from([1, 3]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(chosen, st.fixed_dictionaries(places))
@settings(max_examples=150)
@example({"typical_p": 0.2, "top_k": 2}, {"seed": 1, "new": 0, "prompt": 1, "spread": 1.0, "beams": 3})
def test_any_settings_together_leave_the_distribution_of_transformers(
    given: dict[str, Any], place: dict[str, Any]
) -> None:
    check(given, **place)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*SAMPLERS, *PROCESSORS])
def test_each_setting_alone_leaves_the_distribution_of_transformers_and_changes_it(name: str) -> None:
    bites = False
    for value in {**SAMPLERS, **PROCESSORS}[name]:
        for new in (0, 1, 5):
            for prompt in (1, 3):
                check({name: value}, seed=new, new=new, prompt=prompt, spread=2.0, beams=1)
                x, at = logits(new), history(new, new=new, prompt=prompt)
                given = {"eos_token_id": list(ENDS), "do_sample": name in SAMPLERS, "top_k": None, name: value}
                bites = bites or not torch.equal(filtered(x, at, **given), x)
    assert bites


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_pair_of_settings_leaves_the_distribution_of_transformers() -> None:
    values = {**SAMPLERS, **PROCESSORS}
    for place, (one, two) in enumerate(itertools.combinations(values, 2)):
        # Each value comes with several of the other setting over all pairs; new tokens and prompts vary too.
        given = {name: values[name][place % len(values[name])] for name in (one, two)}
        check(given, seed=place, new=place % 6, prompt=1 + place % 3, spread=2.0, beams=1 + 2 * (place % 2))


def test_a_temperature_that_is_almost_none_leaves_the_likeliest() -> None:
    logits_BV = torch.tensor([[3.0, -torch.inf, 5.0, 4.0], [-2.0, -2.0, -3.0, -torch.inf]])
    for cold in (1e-40, 5e-324):
        chances_BV = temperature(logits_BV, cold).softmax(dim=-1)
        assert chances_BV.tolist() == [[0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0]]


def test_top_k_and_top_p_by_hand() -> None:
    x, at = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), history()
    keep: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": 1.0}
    assert filtered(x, at, **{**keep, "top_k": 2}).isfinite().tolist() == [[False, True, False, True]]
    assert filtered(x, at, **{**keep, "top_p": 0.69}).isfinite().tolist() == [[False, True, False, True]]
    assert filtered(x, at, **{**keep, "top_p": 0.71}).isfinite().tolist() == [[False, True, True, True]]
    assert filtered(x, at, **keep).equal(x)


def test_min_p_and_typical_p_by_hand() -> None:
    x, at = torch.tensor([[0.5, 0.26, 0.12, 0.12]]).log(), history()
    keep: dict[str, Any] = {"do_sample": True, "top_k": None}
    assert filtered(x, at, **keep, min_p=0.5).isfinite().tolist() == [[True, True, False, False]]
    # The entropy is 1.21 nats; surprises are 0.69, 1.35, 2.12 and 2.12: the second token is the most typical one.
    assert filtered(x, at, **keep, typical_p=0.2).isfinite().tolist() == [[False, True, False, False]]
    assert filtered(x, at, **keep, typical_p=0.6).isfinite().tolist() == [[True, True, False, False]]


def test_cutoffs_by_hand() -> None:
    x, at = torch.tensor([[0.5, 0.26, 0.12, 0.12], [0.97, 0.01, 0.01, 0.01]]).log(), history()
    keep: dict[str, Any] = {"do_sample": True, "top_k": None}
    cut = filtered(x, at, **keep, epsilon_cutoff=0.2).isfinite()
    assert cut.tolist() == [[True, True, False, False], [True, False, False, False]]
    # The bounds are √0.04 · e^-1.21 = 0.060 and, where the model is sure, 0.04 itself.
    cut = filtered(x, at, **keep, eta_cutoff=0.04).isfinite()
    assert cut.tolist() == [[True, True, True, True], [True, False, False, False]]
    # √0.2 · e^-1.21 = 0.134 in the first row, where 0.2 would be the bound without the entropy.
    cut = filtered(x, at, **keep, eta_cutoff=0.2).isfinite()
    assert cut.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_tokens_as_likely_as_the_last_kept_are_kept() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert filtered(x, history(), do_sample=True, top_k=2).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("settings", "new", "banned"),
    [
        ({"min_new_tokens": 2}, 1, True),
        ({"min_new_tokens": 2}, 2, False),
        ({"min_length": 5}, 1, True),  # three of the prompt and one new one
        ({"min_length": 5}, 2, False),
    ],
)
def test_no_end_is_chosen_before_the_least_length(settings: dict[str, int], new: int, banned: bool) -> None:
    x = filtered(logits(1), history(new=new), eos_token_id=ENDS, **settings)
    assert x[:, list(ENDS)].isneginf().all().item() is banned
    others = [i for i in range(VOCABULARY) if i not in ENDS]
    assert torch.equal(x[:, others], logits(1)[:, others])


def test_forced_tokens_stand_first_and_last() -> None:
    forced: dict[str, Any] = {"forced_bos_token_id": 4, "forced_eos_token_id": 7}
    short: dict[str, Any] = {"prompt": 1, "max_new": 3}
    assert filtered(logits(1), history(new=0, **short), **forced).argmax(-1).tolist() == [4, 4, 4]
    assert torch.equal(filtered(logits(1), history(new=1, **short), **forced), logits(1))
    assert filtered(logits(1), history(new=2, **short), **forced).argmax(-1).tolist() == [7, 7, 7]
