"""Plots as SVG text: curves over steps and bars to compare. The same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_COLOURS = ("#2f6fab", "#c8553d", "#4a8f55", "#8a5fa8", "#b8860b", "#5c6b73")
_SETTINGS: Any = {
    "svg.hashsalt": "lathe",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        series: label -> (x values, y values).
        x, y: what the axes show, with units.
        levels: label -> a height to mark across the plot.
    """
    figure, axes = _figure(7.5, 3.6)
    for (label, (xs, ys)), colour in zip(series.items(), _COLOURS, strict=False):
        axes.plot(xs, ys, label=label, color=colour, linewidth=1.8, marker="o" if len(xs) < 20 else None, markersize=4)
    for (label, height), colour in zip((levels or {}).items(), reversed(_COLOURS), strict=False):
        axes.axhline(height, label=label, color=colour, linestyle="--", linewidth=1.2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    return _svg(figure)


def bars(values: Mapping[str, float], *, y: str, digits: int = 3) -> str:
    """One bar for each label, its value above it; the axis starts at 0."""
    figure, axes = _figure(7.5, 3.2)
    heights = list(values.values())
    drawn = axes.bar(range(len(values)), heights, color=_COLOURS[: len(values)], width=0.6)
    axes.bar_label(drawn, labels=[f"{height:,.{digits}f}" for height in heights], padding=3)
    axes.set_xticks(range(len(values)), list(values))
    axes.margins(y=0.15)
    axes.set_ylabel(y)
    axes.grid(visible=False, axis="x")
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(out, format="svg", metadata={"Date": None})
    # Only the element itself: the page has a declaration and a document type of its own.
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)
