from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lathe.generate.filters import Progress, pipeline
from lathe.generate.settings import Settings

temperatures = st.sampled_from([None, 0.05, 0.7, 1.0, 3.0])
counts = st.sampled_from([None, 1, 2, 7, 39, 40, 500])
masses = st.sampled_from([None, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])


def logits(seed: int, rows: int = 3, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))


def filtered(x: Tensor, at: Progress, **settings: Any) -> Tensor:
    for each in pipeline(Settings(**settings)):
        x = each(x, at)
    return x


START = Progress(n_prompt=3, n_new=0, max_new=5)


@given(temperatures, counts, masses, st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 30.0]))
def test_the_distribution_is_the_one_of_transformers_warpers(
    t: float | None, k: int | None, p: float | None, seed: int, spread: float
) -> None:
    """Alone (where the others are None) and combined."""
    stock = LogitsProcessorList()
    stock += [] if t is None else [TemperatureLogitsWarper(t)]
    stock += [] if k is None else [TopKLogitsWarper(k)]
    stock += [] if p is None else [TopPLogitsWarper(p)]
    x = logits(seed, spread=spread)
    ours = filtered(x, START, do_sample=True, temperature=t or 1.0, top_k=k, top_p=p or 1.0)
    assert torch.equal(ours.softmax(-1), stock(torch.zeros(3, 1, dtype=torch.long), x).softmax(-1))


def test_top_k_and_top_p_by_hand() -> None:
    x = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    keep = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": 1.0}
    assert filtered(x, START, **{**keep, "top_k": 2}).isfinite().tolist() == [[False, True, False, True]]
    assert filtered(x, START, **{**keep, "top_p": 0.69}).isfinite().tolist() == [[False, True, False, True]]
    assert filtered(x, START, **{**keep, "top_p": 0.71}).isfinite().tolist() == [[False, True, True, True]]
    assert filtered(x, START, **keep).equal(x)


def test_tokens_as_likely_as_the_last_kept_are_kept() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert filtered(x, START, do_sample=True, top_k=2).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("settings", "n_new", "banned"),
    [
        ({"min_new_tokens": 2}, 1, True),
        ({"min_new_tokens": 2}, 2, False),
        ({"min_length": 5}, 1, True),  # three of the prompt and one new one
        ({"min_length": 5}, 2, False),
    ],
)
def test_no_end_is_chosen_before_the_least_length(settings: dict[str, int], n_new: int, banned: bool) -> None:
    x = filtered(logits(1), Progress(3, n_new, 9), eos_token_id=(4, 7), **settings)
    assert x[:, [4, 7]].isneginf().all().item() is banned
    others = [i for i in range(40) if i not in (4, 7)]
    assert torch.equal(x[:, others], logits(1)[:, others])


def test_forced_tokens_stand_first_and_last() -> None:
    forced: dict[str, Any] = {"forced_bos_token_id": 4, "forced_eos_token_id": 7}
    assert filtered(logits(1), Progress(1, 0, 3), **forced).argmax(-1).tolist() == [4, 4, 4]
    assert torch.equal(filtered(logits(1), Progress(1, 1, 3), **forced), logits(1))
    assert filtered(logits(1), Progress(1, 2, 3), **forced).argmax(-1).tolist() == [7, 7, 7]
