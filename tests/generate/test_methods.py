"""Greedy and beam search token for token as in `transformers`: every setting alone and in pairs, ragged prompts.

T5, BART, GPT-2 and Llama with random weights. `transformers` counts pads as text in some filters and Lathe does not
(docs/decoding.md), so the pad may not be chosen here, which makes the two the same.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import lathe
from tests.generate.models import TWINS, VOCABULARY, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTHS, MAX_NEW = (7, 4, 6), 6
FILTERS: dict[str, Any] = {
    "repetition_penalty": 2.5,
    "encoder_repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[9], [27, 27], [22, 50], [35], [50]],
    "begin_suppress_tokens": [22, 51, 28, 53],
    "min_new_tokens": 4,
    "min_length": 9,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 11,
    "renormalize_logits": True,
    "eos_token_id": [27, 51],
}
BEAMS: dict[str, Any] = {
    "num_beams": 4,
    "length_penalty": -1.5,
    "early_stopping": True,
    "num_return_sequences": 2,
}


def batch(model: lathe.Model) -> dict[str, Tensor]:
    """Three rows of different lengths; a decoder's pads stand on the left, an encoder's on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((3, max(LENGTHS)), model.architecture.tokens.pad or 0)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        where = slice(-n, None) if model.encoder is None else slice(0, n)
        ids[row, where] = torch.randint(5, VOCABULARY, (n,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def filled(ids: Tensor, n_prompt: int, ends: list[int], filler: int) -> Tensor:
    """The rows with one filler after their end: `transformers` takes a pad of id 0 for none when it fills beams."""
    ids = ids.clone()
    ended = torch.isin(ids[:, n_prompt:], torch.tensor(ends)).int().cumsum(1)
    after = torch.cat((torch.zeros(len(ids), 1, dtype=torch.bool), ended[:, :-1] > 0), 1)
    ids[:, n_prompt:] = ids[:, n_prompt:].masked_fill(after, filler)
    return ids


def both(name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    theirs, ours = PAIRS[name]
    tokens, n_prompt = ours.architecture.tokens, 1 if ours.encoder is not None else max(LENGTHS)
    pad = tokens.pad or 0
    settings = {"max_new_tokens": MAX_NEW, "suppress_tokens": [pad], **given}
    ends = settings.get("eos_token_id") or list(tokens.eos)
    inputs = batch(ours)
    return tuple(filled(each.generate(**inputs, **settings), n_prompt, ends, pad) for each in (ours, theirs))  # type: ignore[return-value]


def combined(names: dict[str, Any]) -> list[tuple[str, str]]:
    """Each pair but the two least lengths: a call may give one of them (transformers passes over the other)."""
    return [pair for pair in itertools.combinations(names, 2) if set(pair) != {"min_new_tokens", "min_length"}]


PAIRS = {name: twins(name) for name in TWINS}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("beams", [{}, BEAMS], ids=["greedy", "beams"])
def test_every_setting_alone(name: str, beams: dict[str, Any]) -> None:
    for key, value in FILTERS.items():
        ours, theirs = both(name, {**beams, key: value})
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("place", range(4), ids=TWINS)
def test_every_pair_of_settings_greedily(place: int) -> None:
    """Each pair with one of the encoder-decoders and one of the decoders, in turn."""
    for one, two in combined(FILTERS)[place % 2 :: 2]:
        ours, theirs = both(list(TWINS)[place], {one: FILTERS[one], two: FILTERS[two]})
        assert torch.equal(ours, theirs), (one, two)


@pytest.mark.parametrize("place", range(4), ids=TWINS)
def test_every_pair_of_settings_with_beams(place: int) -> None:
    """Each pair with one of the four in turn; the settings of beams are among them."""
    several = {"length_penalty": 2.0, "early_stopping": "never", "num_return_sequences": 3, **FILTERS}
    for one, two in combined(several)[place::4]:
        ours, theirs = both(list(TWINS)[place], {"num_beams": 3, one: several[one], two: several[two]})
        assert torch.equal(ours, theirs), (one, two)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
def test_beams_end_when_transformers_own_do(name: str, early: bool | str, penalty: float) -> None:
    """With ends that several beams meet at different steps, and more of them."""
    for ends in ([27, 51, 48], [22, 35]):
        given = {"num_beams": 3, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": 3}
        ours, theirs = both(name, {**given, "eos_token_id": ends, "max_new_tokens": 9})
        assert torch.equal(ours, theirs)


def test_every_setting_changes_some_text() -> None:
    """Else the tests above would hold with settings that do nothing."""
    ends: dict[str, Any] = {"eos_token_id": [27, 51, 48]}
    for base, names in (
        ({}, [name for name in FILTERS if not name.startswith(("min_", "renormalize"))]),
        (ends, ["min_length", "min_new_tokens"]),
        ({"num_beams": 3, **ends}, ["length_penalty", "early_stopping", "renormalize_logits"]),
    ):
        values = {**FILTERS, "length_penalty": -3.0, "early_stopping": True}
        for key in names:
            # Without another filter there is nothing to make up for.
            start = {**base, "repetition_penalty": 2.5} if key == "renormalize_logits" else base
            assert any(
                not torch.equal(both(name, start)[0], both(name, {**start, key: values[key]})[0]) for name in PAIRS
            ), key
