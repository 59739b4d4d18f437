"""Names in pictures: in a font that has their characters, as text, or as numbers; never as boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lathe.report.fonts import fonts_for, writing
from lathe.report.frontier import Point, frontier_svg, write_frontier_png
from lathe.report.plots import Line, Mark, Panel, bars, curves, panel, write_png

PRIVATE = "\U0010fffd"  # no font has a character there


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no font but matplotlib's own; a glyph that is missing is an error."""
    from matplotlib import font_manager

    own = font_manager.findfont(font_manager.FontProperties())
    found = [font for font in font_manager.fontManager.ttflist if font.fname == own]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", found)
    warnings.simplefilter("error")


def test_a_font_that_has_what_the_usual_one_lacks_is_taken() -> None:
    from matplotlib import font_manager

    here = font_manager.fontManager.ttflist
    usual = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap().keys()
    for font in sorted(here, key=lambda font: font.name):
        if font.style != "normal" or font.weight != 400 or font.name.startswith("Last Resort"):
            continue
        more = sorted(font_manager.get_font(font.fname).get_charmap().keys() - usual)
        if more:  # the mathematical fonts that come with matplotlib have some
            families, unwritten = fonts_for([chr(more[0])])
            assert (len(families), unwritten) == (2, [])
            return
    raise AssertionError("every font has the same characters")


def test_a_text_that_no_font_writes_is_told() -> None:
    families, unwritten = fonts_for(["fox", PRIVATE])
    assert (len(families), unwritten) == (1, [PRIVATE])


def test_names_without_a_font_are_numbers_in_a_picture_and_text_on_a_page(bare: None, tmp_path: Path) -> None:
    with writing(["fox", "큰", "작은", "$"], {}, svg=False) as written:
        assert [written(name) for name in ("fox", "큰", "작은", "$")] == ["fox", "no. 2", "no. 3", r"\$"]
    with writing(["큰"], {}, svg=True) as written:
        assert written("큰") == "큰"
    points = [Point("모델/큰", 20, 1.0), Point("모델/작은", 10, 2.0)]
    write_frontier_png(points, tmp_path / "a.png", y="loss")
    drawn = Panel("loss", "steps", "nats", [Line([1, 2], [2, 1], "큰")], [Mark(1, 2, "작은")])
    write_png([drawn], tmp_path / "b.png", of=["실행"])
    lines = {name: ([1.0, 2.0], [2.0, 1.0]) for name in ("큰", "작은")}
    for page in (
        frontier_svg(points, y="loss"),
        panel(drawn),
        curves(lines, x="steps", y="nats"),
        bars({"큰": 1.0, "작은": 2.0}, y="nats"),
    ):
        assert "큰" in page.replace("&#53360;", "큰")
        assert "작은" in page
    assert "<text" not in frontier_svg([Point("large", 20, 1.0)], y="loss")  # what can be drawn is drawn
