"""Filters that look at the text: OpenAI's penalties by hand, and that pads are no part of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lathe.generate.filters import pipeline
from lathe.generate.history import History
from lathe.generate.prompt import Prompt
from lathe.generate.settings import Settings

VOCABULARY = 9
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 2.0},
    {"encoder_repetition_penalty": 2.0},
    {"presence_penalty": 0.5, "frequency_penalty": -0.25},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": ((0, 3), (3, 3, 1), (2,))},
]


def row(prompt: list[int], new: list[int], source: list[int], width: int) -> History:
    """One row, its prompt and source filled up with token 0 to a width."""
    ids, mask = torch.zeros(4, 1, width, dtype=torch.long)[:2]
    read, read_mask = torch.zeros(4, 1, width, dtype=torch.long)[:2]
    ids[0, width - len(prompt) :], mask[0, width - len(prompt) :] = torch.tensor(prompt), 1
    read[0, width - len(source) :], read_mask[0, width - len(source) :] = torch.tensor(source), 1
    at = History.of(Prompt(ids, mask), width, 9, Prompt(read, read_mask))
    for token in new:
        at.append(torch.tensor([token]))
    return at


def filtered(at: History, **settings: Any) -> Tensor:
    x = torch.linspace(-2, 2, VOCABULARY)[None]
    for change in pipeline(Settings.from_dict(settings)):
        x = change(x, at)
    return x


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("new", [[], [3], [3, 1, 3], [0, 0]])
def test_a_row_is_judged_alike_with_pads_and_without(settings: dict[str, Any], new: list[int]) -> None:
    """The pads are token 0, which may also be a token of the text."""
    prompt, source = [3, 1], [0, 3, 1, 2]
    assert torch.equal(
        filtered(row(prompt, new, source, 4), **settings), filtered(row(prompt, new, source, 7), **settings)
    )


def test_openai_s_penalties_count_the_new_tokens_alone() -> None:
    """logit − frequency · count − presence · (count > 0), over the tokens sampled so far."""
    at = row([3, 1], [5, 5, 1], [2], 4)
    x = torch.linspace(-2, 2, VOCABULARY)
    expected = x.clone()
    expected[5] -= 2 * 0.3 + 0.7
    expected[1] -= 0.3 + 0.7
    torch.testing.assert_close(filtered(at, frequency_penalty=0.3, presence_penalty=0.7)[0], expected)


def test_the_repetition_penalty_counts_the_prompt_and_the_sign() -> None:
    at = row([0, 8], [], [2], 2)
    x = torch.linspace(-2, 2, VOCABULARY)
    found = filtered(at, repetition_penalty=2.0)[0]
    assert found[0] == x[0] * 2
    assert found[8] == x[8] / 2
    assert torch.equal(found[1:8], x[1:8])


def test_a_run_from_the_list_is_never_completed_and_a_run_of_the_text_never_repeated() -> None:
    at = row([3, 1], [4, 3], [6, 3, 7], 3)
    assert filtered(at, bad_words_ids=((3, 5), (4, 3, 6), (1, 3, 7)))[0].isneginf().nonzero()[:, 0].tolist() == [5, 6]
    assert filtered(at, no_repeat_ngram_size=2)[0].isneginf().nonzero()[:, 0].tolist() == [1]
    assert filtered(at, no_repeat_ngram_size=1)[0].isneginf().nonzero()[:, 0].tolist() == [1, 3, 4]
    assert filtered(at, encoder_no_repeat_ngram_size=2)[0].isneginf().nonzero()[:, 0].tolist() == [7]
    assert filtered(at, no_repeat_ngram_size=9)[0].isfinite().all()
