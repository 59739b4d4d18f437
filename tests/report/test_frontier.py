"""The frontier: which models no other beats, and a plot that is the same for the same numbers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lathe.report.frontier import Point, best, frontier_svg, write_frontier_png

points = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 20)).map(lambda pair: Point("model", pair[0], pair[1] / 4)),
    min_size=1,
    max_size=12,
)


@given(points)
def test_a_model_on_the_frontier_is_beaten_by_none(drawn: list[Point]):
    found = best(drawn)
    sizes = [point.parameters for point in found]
    assert sizes == sorted(set(sizes))
    for point in drawn:
        beaten = any(
            other.parameters <= point.parameters and other.loss <= point.loss and other != point for other in drawn
        )
        assert (point in found) != beaten


def test_every_model_is_named_in_the_plot_and_the_same_numbers_give_the_same_bytes(tmp_path: Path):
    drawn = [Point("parent", 2_000_000, 3.0), Point("small", 900_000, 3.2), Point("worse", 1_500_000, 3.5)]
    once = frontier_svg(drawn, y="loss")
    assert once.startswith("<svg")
    assert once == frontier_svg(drawn, y="loss")
    assert once != frontier_svg(drawn, y="loss", in_order=True)
    for name in ("a.png", "b.png"):
        write_frontier_png(drawn, tmp_path / name, y="loss")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_long_name_leaves_the_plot_its_room():
    long = Point("refit at d_model 144 (16 of 26 fits left out: one, another and 13 more)", 10, 1.0)
    endless = Point("x" * 400, 20, 2.0)
    drawn = frontier_svg([long, endless], y="loss")
    assert drawn == frontier_svg([Point("refit at d_model 144", 10, 1.0), Point("x" * 33 + "…", 20, 2.0)], y="loss")
