"""The frontier: loss against parameters, one point a model. Down and to the left is better.

Models on the frontier have no other that is both smaller and better; a line joins them where they are compared. On the
page of one resize, a line follows the steps in their order instead.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lathe.report.fonts import writing
from lathe.report.labels import short, told_apart

_COLOURS = ("#2f6fab", "#c8553d", "#4a8f55", "#8a5fa8", "#b8860b", "#5c6b73")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X")
# Characters of a name that the legend has room for; the tables have the whole name.
_NAME = 34
_SETTINGS: Any = {"svg.hashsalt": "lathe", "svg.fonttype": "path", "font.size": 11}


@dataclass(frozen=True)
class Point:
    """A model: its name, its parameters, its loss."""

    name: str
    parameters: int
    loss: float


def best(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, from the smallest to the largest."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.parameters, each.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def frontier_svg(points: Sequence[Point], *, y: str, in_order: bool = False) -> str:
    """The plot as an SVG element.

    Args:
        y: what the height shows, with its unit.
        in_order: join the points as they come, not those on the frontier.
    """
    out = io.StringIO()
    with writing(_labels(points, in_order), _SETTINGS, svg=True) as written:
        figure = _drawn(points, y, in_order, "svg", written)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)


def write_frontier_png(points: Sequence[Point], path: Path, *, y: str) -> None:
    """The plot as a picture."""
    with writing(_labels(points, False), _SETTINGS, svg=False) as written:
        figure = _drawn(points, y, False, "png", written)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _drawn(points: Sequence[Point], y: str, in_order: bool, form: str, written: Callable[[str], str]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    (FigureCanvasSVG if form == "svg" else FigureCanvasAgg)(figure)
    axes = figure.add_subplot()
    line = list(points) if in_order else best(points)
    axes.plot([p.parameters for p in line], [p.loss for p in line], color="#999", linewidth=1.2, zorder=1)
    for number, (point, label) in enumerate(zip(points, _labels(points, in_order), strict=True)):
        axes.scatter(
            [point.parameters],
            [point.loss],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_SHAPES[number % len(_SHAPES)],
            s=60,
            label=written(label),
            zorder=2,
        )
    axes.set_xlabel("parameters")
    axes.set_ylabel(y)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.margins(0.12)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _labels(points: Sequence[Point], in_order: bool) -> list[str]:
    """Steps without what stands in brackets at their ends; models by what tells their paths apart."""
    if in_order:
        return short([point.name.split(" (")[0] for point in points], _NAME)
    return short(told_apart([PurePath(point.name) for point in points]), _NAME)
