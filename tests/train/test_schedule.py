"""Learning rates at the steps where their formulas are known."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.train.schedule import rate
from lathe.train.settings import ScheduleSettings

KINDS = ["cosine", "linear", "inverse_sqrt", "wsd", "constant"]


def rates(steps: int, **settings) -> list[float]:
    return [rate(ScheduleSettings(**settings), step, step / steps) for step in range(steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_rises_evenly_to_the_peak(kind: str):
    assert rates(100, kind=kind, warmup=10)[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])


def test_cosine_is_half_way_down_in_the_middle_of_what_the_warm_up_leaves():
    found = rates(110, kind="cosine", warmup=10, floor=0.1)
    assert found[10] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.55)
    assert found[110] == pytest.approx(0.1)


def test_linear_falls_evenly():
    found = rates(110, kind="linear", warmup=10)
    assert found[10::25] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_inverse_sqrt_halves_when_the_steps_quadruple():
    found = rates(1000, kind="inverse_sqrt", warmup=100)
    assert found[399] == pytest.approx(0.5)
    assert found[899] == pytest.approx(1 / 3)


def test_wsd_holds_the_peak_and_then_falls():
    found = rates(100, kind="wsd", decay=0.2)
    assert found[:81] == [1.0] * 81
    assert found[85] == pytest.approx(1 - math.sqrt(0.25))
    assert found[100] == pytest.approx(0.0)


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    floor=st.sampled_from([0.0, 0.1]),
    decay=st.sampled_from([0.0, 0.2, 0.9]),
)
def test_a_rate_is_always_a_share_that_falls_after_the_warm_up(
    kind: str, steps: int, warmup: int, floor: float, decay: float
):
    found = rates(steps, kind=kind, warmup=warmup, floor=floor, decay=decay)
    assert all(0.0 <= each <= 1.0 for each in found)
    after = found[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
