from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.generate.draw import draw, draw_several, numbers
from lathe.generate.settings import Settings


def sampling(**settings: object) -> Settings:
    return Settings.from_dict({"do_sample": True, **settings})


def test_an_even_grid_of_numbers_draws_every_token_as_often_as_its_probability_says() -> None:
    n = 10_000
    logits_V = torch.randn(30, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(draw(logits_V.expand(n, -1), grid), minlength=30)
    assert (counts - n * logits_V.double().softmax(0)).abs().max() <= 1


@given(st.integers(0, 2**63 - 1), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
def test_what_was_ruled_out_is_never_drawn(seed: int, u: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = 5 * torch.randn(4, 20, generator=generator)
    kept = torch.randint(20, (4, 1), generator=generator)
    out = torch.rand(4, 20, generator=generator) < 0.7
    logits_BV = logits_BV.masked_fill(out.scatter(1, kept, False), -torch.inf)
    drawn_B = draw(logits_BV, torch.full((4,), u, dtype=torch.float64))
    assert logits_BV.gather(1, drawn_B[:, None]).isfinite().all()


def test_more_steps_go_on_from_the_same_numbers() -> None:
    few, many = (numbers(sampling(seed=3), 2, n) for n in (5, 40))
    assert torch.equal(few, many[:, :5])


def test_every_row_has_numbers_of_its_own() -> None:
    rows = numbers(sampling(seed=3), 4, 8, copies=3)
    assert rows.shape == (12, 8)
    assert len(rows.unique()) == rows.numel()
    # Neither do neighbouring seeds share any.
    assert not torch.isin(rows, numbers(sampling(seed=4), 4, 8, copies=3)).any()
    assert 0 <= rows.min() < rows.max() < 1


def test_a_seed_for_each_prompt_is_that_prompts_wherever_it_stands() -> None:
    together = numbers(sampling(seed=[7, 8, 9]), 3, 6, copies=2)
    for row, seed in enumerate((7, 8, 9)):
        alone = numbers(sampling(seed=seed), 1, 6, copies=2)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_without_a_seed_the_global_generator_decides() -> None:
    torch.manual_seed(5)
    first, second = numbers(sampling(), 1, 4), numbers(sampling(), 1, 4)
    torch.manual_seed(5)
    assert torch.equal(first, numbers(sampling(), 1, 4))
    assert not torch.equal(first, second)


def test_as_many_seeds_as_prompts() -> None:
    with pytest.raises(RequestError, match="2 seeds for 3 prompts: expected one for each"):
        numbers(sampling(seed=[1, 2]), 3, 4)


def test_several_are_drawn_one_after_the_other_from_what_is_left() -> None:
    """Against P(a, b) = p_a · p_b / (1 − p_a), over a grid of pairs of numbers; no token twice."""
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    n = 200
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn_B2 = draw_several(p_V.log().expand(n * n, -1), torch.cartesian_prod(grid, grid))
    counts = torch.bincount(drawn_B2[:, 0] * 4 + drawn_B2[:, 1], minlength=16).view(4, 4).double() / n**2
    expected = p_V[:, None] * p_V / (1 - p_V[:, None])
    assert (counts - expected.fill_diagonal_(0)).abs().max() < 0.01


def test_where_too_few_have_a_chance_they_come_first() -> None:
    scores_BV = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]] * 50)
    u_BN = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn_BN = draw_several(scores_BV, u_BN)
    assert drawn_BN[:, :2].sort().values.tolist() == [[1, 3]] * 50
    assert all(len(set(row)) == 4 for row in drawn_BN.tolist())
