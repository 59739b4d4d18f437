"""Where a budget is spent: the search is held against every combination of sizes there is."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.reshape.budget_axes import Axis
from lathe.reshape.budget_search import Prices, Search

SIZES = (7, 6, 5, 4, 3, 2, 1)


def made(rises: list[tuple[float, float]]) -> Prices:
    """Axes of 8, whose loss at half and at one eighth is given."""
    axes = [Axis(f"axis {n}", f"a{n}", 8, SIZES) for n in range(len(rises))]
    return Prices(axes, {f"a{n}": {4: half, 1: deep} for n, (half, deep) in enumerate(rises)})


def kept(place: tuple[int, ...]) -> list[int]:
    return [8 if at == 0 else SIZES[at - 1] for at in place]


def test_between_measured_sizes_the_loss_is_on_a_line_and_past_them_it_rises_faster():
    prices = Prices([Axis("one", "a", 8, SIZES)], {"a": {6: 0.2, 4: 0.3}})
    assert [round(prices.alone(0, place), 9) for place in range(6)] == [0.0, 0.1, 0.2, 0.25, 0.3, 0.4]


def test_a_deeper_cut_is_never_taken_to_cost_less():
    prices = Prices([Axis("one", "a", 8, SIZES)], {"a": {6: 0.2, 4: -0.1}})
    assert prices.alone(0, 4) == 0.2


@given(
    rises=st.lists(st.tuples(st.floats(0.01, 1), st.floats(1, 4)), min_size=2, max_size=3),
    share=st.floats(0.2, 0.9),
)
@settings(max_examples=15, deadline=None)
def test_the_search_is_near_the_best_of_all_and_never_worse_than_one_axis(rises, share):
    prices = made(rises)
    axes = len(rises)
    limit = share * 8**axes

    def cost(place: tuple[int, ...]) -> float:
        total = 1.0
        for size in kept(place):
            total *= size
        return total

    search = Search(prices, cost, limit)
    found = search.best()
    assert found
    assert all(cost(place) <= limit for place in found)
    every = [place for place in itertools.product(range(8), repeat=axes) if cost(place) <= limit]
    best = min(map(prices.of, every))
    single = min(prices.of(place) for place in every if sum(at > 0 for at in place) == 1) if share >= 1 / 8 else None
    assert single is None or prices.of(found[0]) <= single + 1e-9
    assert prices.of(found[0]) <= 1.25 * best + 1e-9


def test_a_plan_that_cost_more_than_the_sum_makes_its_axes_dearer_and_no_other():
    prices = made([(0.1, 1.0), (0.3, 1.0), (0.2, 1.0)])
    before = prices.of((4, 4, 0))
    prices.learn((4, 4, 0), 2 * before)
    assert prices.weights[1] > prices.weights[0] > 1.0
    assert prices.weights[2] == 1.0
    assert prices.of((4, 4, 0)) > before


def test_sizes_that_cannot_be_had_together_are_passed_by():
    prices = made([(0.1, 0.2), (0.5, 1.5)])
    limit = 24.0

    def cost(place: tuple[int, ...]) -> float | None:
        one, other = kept(place)
        return None if one < other else float(one * other)

    found = Search(prices, cost, limit).best()
    assert found
    assert all(kept(place)[0] >= kept(place)[1] for place in found)


def test_a_limit_that_no_place_meets_has_no_plan():
    assert Search(made([(0.1, 0.2)]), lambda place: 100.0 + kept(place)[0], 50.0).best() == []
