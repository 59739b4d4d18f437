"""What test_methods.py cannot hold against `transformers`: groups, sampled beams, scores, and rows on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lathe
from lathe.errors import RequestError
from lathe.generate import decode
from tests.generate.models import VOCABULARY, sampler, twins

LENGTHS = (7, 4, 6)
FREE: dict[str, Any] = {"eos_token_id": None, "forced_eos_token_id": None}


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def model(request: pytest.FixtureRequest) -> lathe.Model:
    return sampler(request.param)


def batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(2, 3, max(LENGTHS), dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        ids[row, :n], mask[row, :n] = torch.randint(5, VOCABULARY, (n,), generator=generator), 1
    return {"input_ids": ids, "attention_mask": mask}


def next_log_probs(model: lathe.Model, prompt: Tensor, text: list[int]) -> Tensor:
    """By a forward without a cache."""
    with torch.no_grad():
        if model.encoder is None:
            logits = model(torch.cat((prompt, torch.tensor([text], dtype=torch.long)), 1)).logits
        else:
            start = model.architecture.tokens.decoder_start
            logits = model(prompt, decoder_input_ids=torch.tensor([[start, *text]])).logits
    return logits[0, -1].float().log_softmax(-1)


def diverse(
    model: lathe.Model, prompt: Tensor, beams: int, groups: int, penalty: float, length: int
) -> list[tuple[float, list[int]]]:
    """Vijayakumar et al. 2018, algorithm 1, with Hamming distance, a beam at a time; no text ends."""
    held: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(groups)]
    for _ in range(length):
        taken = torch.zeros(VOCABULARY)
        for number in range(groups):
            every = []
            for score, text in held[number]:
                scores = score + next_log_probs(model, prompt, text) - penalty * taken
                every += [(float(s), [*text, token]) for token, s in enumerate(scores)]
            held[number] = sorted(every, reverse=True)[: beams // groups]
            for _, text in held[number]:
                taken[text[-1]] += 1
    return sorted((each for group in held for each in group), reverse=True)


@pytest.mark.parametrize(("groups", "penalty"), [(1, 0.0), (2, 0.4), (2, 3.0), (4, 1.5)])
def test_groups_are_the_papers_algorithm(model: lathe.Model, groups: int, penalty: float) -> None:
    prompts = batch()
    settings: dict[str, Any] = {
        "num_beams": 4,
        "num_beam_groups": groups,
        "diversity_penalty": penalty,
        "num_return_sequences": 4,
    }
    found = decode(model, **prompts, **settings, length_penalty=0.0, max_new_tokens=3, **FREE)
    new = found.sequences_RT[:, found.n_prompt :].tolist()
    for row, n in enumerate(LENGTHS):
        expected = diverse(model, prompts["input_ids"][row : row + 1, :n], 4, groups, penalty, 3)
        assert new[4 * row : 4 * row + 4] == [text for _, text in expected]
        scores = torch.tensor([score for score, _ in expected])
        torch.testing.assert_close(found.scores_R[4 * row : 4 * row + 4], scores, rtol=1e-4, atol=1e-4)


def singly(model: lathe.Model, prompt: Tensor, groups: int, penalty: float, length: int, ends: set[int]) -> set[Any]:
    """Groups of one beam, each until its likeliest token is one that ends it; then it chooses nothing any more."""
    held: list[list[int]] = [[] for _ in range(groups)]
    for _ in range(length):
        taken = torch.zeros(VOCABULARY)
        for text in held:
            if text and text[-1] in ends:
                continue
            scores = next_log_probs(model, prompt, text) - penalty * taken
            going_on = scores.clone()
            going_on[list(ends)] = -torch.inf
            taken[int(going_on.argmax())] += 1
            text.append(int(scores.argmax()))
    return {tuple(text) for text in held}


def test_a_group_that_has_its_text_pushes_the_others_nowhere() -> None:
    model, ends = sampler("t5"), [*range(5, 30, 3)]
    asked: dict[str, Any] = {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 5.0, "num_return_sequences": 4}
    asked |= {"early_stopping": True, "max_new_tokens": 8, "eos_token_id": ends, "forced_eos_token_id": None}
    prompts = torch.randint(5, VOCABULARY, (24, 4), generator=torch.Generator().manual_seed(0))
    found = decode(model, prompts, **asked)
    early = 0
    for row, prompt in enumerate(prompts):
        new = found.sequences_RT[4 * row : 4 * row + 4, found.n_prompt :].tolist()
        cut = {tuple(text[: 1 + next((at for at, each in enumerate(text) if each in ends), 8)]) for text in new}
        assert cut == singly(model, prompt[None], 4, 5.0, 8, {*ends})
        early += len({len(text) for text in cut}) > 1
    assert early > 5


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 2.0},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "repetition_penalty": 1.5},
        {"num_beams": 2, "do_sample": True, "seed": [3, 4, 5], "temperature": 2.0, "num_return_sequences": 2},
        {"do_sample": True, "seed": [3, 4, 5], "min_p": 0.01, "frequency_penalty": 1.0, "num_return_sequences": 3},
        {"no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2.0, "presence_penalty": 0.5},
    ],
    ids=str,
)
def test_a_row_in_a_batch_is_the_row_alone(model: lathe.Model, settings: dict[str, Any]) -> None:
    """With ends that come at different steps, and whatever stands beside it."""
    prompts, ends = batch(), [27, 22, 51]
    together = decode(model, **prompts, max_new_tokens=9, **{**settings, "eos_token_id": ends})
    copies = settings.get("num_return_sequences", 1)
    for row, n in enumerate(LENGTHS):
        own = {**settings, "eos_token_id": ends}
        if "seed" in own:
            own["seed"] = own["seed"][row]
        alone = decode(model, prompts["input_ids"][row : row + 1, :n], max_new_tokens=9, **own)
        rows = slice(copies * row, copies * (row + 1))
        assert torch.equal(alone.lengths_R, together.lengths_R[rows])
        assert torch.equal(alone.ended_R, together.ended_R[rows])
        torch.testing.assert_close(alone.scores_R, together.scores_R[rows], rtol=1e-5, atol=1e-5)
        for mine, its, length in zip(alone.sequences_RT, together.sequences_RT[rows], alone.lengths_R):
            mine, its = mine[alone.n_prompt :], its[together.n_prompt :]
            assert torch.equal(mine[:length], its[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_scores_and_log_probabilities_are_those_of_transformers(name: str) -> None:
    theirs, ours = twins(name)
    left = {key: value.flip(1) for key, value in batch().items()}
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "length_penalty": 0.7}
    stock = theirs.generate(**left, **settings, return_dict_in_generate=True, output_scores=True)
    found = decode(ours, **left, **settings, stored=ours.generation)
    torch.testing.assert_close(found.scores_R, stock.sequences_scores, rtol=1e-4, atol=1e-4)
    stock = theirs.generate(
        **left, max_new_tokens=6, eos_token_id=None, forced_eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = decode(ours, **left, max_new_tokens=6, **FREE)
    each = theirs.compute_transition_scores(stock.sequences, stock.scores, normalize_logits=True)
    torch.testing.assert_close(found.log_probs_RT, each, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores_R, each.sum(1), rtol=1e-4, atol=1e-4)


def test_sampled_beams_are_drawn_without_replacement_as_often_as_the_model_says(model: lathe.Model) -> None:
    """Two of the three likeliest tokens, 1,500 times: each pair within five standard deviations."""
    prompt, n = torch.tensor([[9, 8, 7]]), 1500
    settings: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "top_k": 3}
    found = decode(model, prompt.expand(n, -1), **settings, temperature=3.0, seed=0, max_new_tokens=1, **FREE)
    kept = (next_log_probs(model, prompt, []) / 3.0).topk(3)
    p = kept.values.softmax(-1).tolist()
    pairs = found.sequences_RT[:, -1].view(n, 2).sort(dim=1).values.tolist()
    for one, two in ((0, 1), (0, 2), (1, 2)):
        expected = p[one] * p[two] / (1 - p[one]) + p[two] * p[one] / (1 - p[two])
        count = pairs.count(sorted((int(kept.indices[one]), int(kept.indices[two]))))
        assert abs(count - n * expected) <= 5 * (n * expected * (1 - expected)) ** 0.5 + 1


def test_settings_that_leave_no_token_or_too_few_texts_are_one_line(model: lathe.Model) -> None:
    prompts = batch()
    for beams in (1, 2):
        with pytest.raises(RequestError, match="leave row 0 no token to choose as new token 1; ban fewer"):
            decode(model, **prompts, num_beams=beams, suppress_tokens=list(range(VOCABULARY)), **FREE)
    with pytest.raises(RequestError, match=r"leave row 0 only 1 text\(s\) and num_return_sequences asks for 2"):
        decode(
            model,
            **prompts,
            num_beams=2,
            num_return_sequences=2,
            forced_eos_token_id=5,
            eos_token_id=5,
            max_new_tokens=1,
        )


def test_stop_strings_need_a_tokenizer(model: lathe.Model) -> None:
    with pytest.raises(RequestError, match="found with a tokenizer and this model has none"):
        model.generate(**batch(), stop_strings=["."])
