"""The frontier: which models no other beats, and a plot that is the same for the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.report.frontier import Point, _drawn, best, frontier_svg, write_frontier_png
from lathe.report.labels import as_written, short

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
    drawn = frontier_svg([long, endless], y="loss", in_order=True)
    shown = [Point("refit at d_model 144", 10, 1.0), Point("x" * 16 + "…" + "x" * 17, 20, 2.0)]
    assert drawn == frontier_svg(shown, y="loss", in_order=True)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["/home/a/models/bert-rotated", "/home/a/models/bert-truncated"], ["bert-rotated", "bert-truncated"]),
        (["one/last", "other/last"], ["one/last", "other/last"]),
        (["m (1)", "m (2)"], ["m (1)", "m (2)"]),
        ([".", "../parent"], [".", "parent"]),
        (["/a", "/b/a"], ["/a", "b/a"]),
        ([f"{'x' * 60}1", f"{'x' * 60}2"], [f"{'x' * 16}…{'x' * 16}1", f"{'x' * 16}…{'x' * 16}2"]),
        ([f"a{'x' * 60}", f"b{'x' * 60}"], [f"a{'x' * 15}…{'x' * 17}", f"b{'x' * 15}…{'x' * 17}"]),
        (["_a", "$x_{$"], [" _a", r"\$x_{\$"]),
    ],
)
def test_the_legend_tells_models_apart(names: list[str], shown: list[str]):
    (axes,) = _drawn([Point(name, 10, 1.0) for name in names], "loss", False, "svg", as_written).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == shown
    assert frontier_svg([Point(name, 10, 1.0) for name in names], y="loss").startswith("<svg")


@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=5, unique=True), st.integers(1, 12))
def test_names_that_differ_stay_apart_when_they_are_shortened(names: list[str], most: int):
    found = short(names, most)
    assert len(set(found)) == len(names)
    assert all(len(each) <= max(most, len(name)) for each, name in zip(found, names, strict=True))
