from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.planner.corpus import corpus_advice


@pytest.mark.parametrize(
    ("parameters", "tokens", "risk"),
    [
        (1_000_000, 20_000_000, "low"),
        (1_000_000, 19_000_000, "moderate"),
        (1_000_000, 5_000_000, "moderate"),
        (1_000_000, 4_900_000, "high"),
        (1_000_000, 1_250_000, "high"),
        (1_000_000, 1_200_000, "very high"),
        (70_000_000_000, 1_400_000_000_000, "low"),  # Chinchilla itself
    ],
)
def test_the_risk_follows_from_the_epochs_that_would_reach_twenty(parameters: int, tokens: int, risk: str) -> None:
    assert corpus_advice(parameters, tokens).risk == risk


def test_the_reason_names_a_size_that_would_fit() -> None:
    advice = corpus_advice(124_439_808, 40_000_000)
    assert advice.best_parameters == 2_000_000
    assert advice.tokens_per_parameter == pytest.approx(0.3214, rel=1e-3)
    assert "62 epochs" in advice.reason
    assert "2.00M to 8.00M parameters" in advice.reason


@given(st.integers(1, 10**12), st.integers(1, 10**14))
def test_a_model_of_the_size_it_names_has_enough(parameters: int, tokens: int) -> None:
    advice = corpus_advice(parameters, tokens)
    assert advice.risk in ("low", "moderate", "high", "very high")
    assert advice.reason.endswith(".")
    if tokens >= 20:
        assert corpus_advice(advice.best_parameters, tokens).tokens_per_parameter == pytest.approx(20, rel=0.5)


@given(st.integers(1, 10**9), st.integers(1, 10**12))
def test_more_text_is_never_a_higher_risk(parameters: int, tokens: int) -> None:
    order = ("low", "moderate", "high", "very high")
    less, more = corpus_advice(parameters, tokens), corpus_advice(parameters, 2 * tokens)
    assert order.index(more.risk) <= order.index(less.risk)
