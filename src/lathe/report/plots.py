"""Plots: curves over a common axis and bars to compare, as SVG text or as one PNG.

The same numbers give the same bytes. A curve of a hundred thousand steps is drawn from a few hundred points: of each
stretch its lowest and its highest, so that no spike is lost.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lathe.report.fonts import writing

_COLOURS = ("#2f6fab", "#c8553d", "#4a8f55", "#8a5fa8", "#b8860b", "#5c6b73")
_DASHES = ("-", "--", ":", "-.")  # from the seventh line on, the colours come again with the next of these
_MOST_POINTS = 800
_SETTINGS: Any = {
    "svg.hashsalt": "lathe",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        label: for the legend; none where left out.
        colour: a number; the same number is the same colour in every plot.
        kind: `plain`; `thin`, for what is restless; `faint`, for what another line smooths; `points`, a marker at each.
    """

    xs: Sequence[float]
    ys: Sequence[float]
    label: str | None = None
    colour: int = 0
    kind: str = "plain"


@dataclass(frozen=True)
class Mark:
    """A point of a curve that is set apart; marks of one label share an entry of the legend."""

    x: float
    y: float
    label: str
    colour: int = 0
    shape: str = "*"


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes.

    Args:
        x, y: what the axes show, with units.
        log: whether the height is logarithmic.
        zero: whether the height starts at 0.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = field(default_factory=tuple)
    log: bool = False
    zero: bool = False


def panel(drawn: Panel) -> str:
    """One panel as SVG, without its title, which the page around it gives."""
    with writing(_names([drawn]), _SETTINGS, svg=True) as written:
        figure, axes = _figure(7.5, 3.6)
        _draw(axes, drawn, written)
        return _svg(figure)


def write_png(panels: Sequence[Panel], path: Path, *, of: Sequence[str]) -> None:
    """All panels as one picture: the first over the whole width, the others in rows below it.

    Args:
        of: the names of what is shown, which stand above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(panels) in (3, 5) else 3  # so that no row is left half empty
    rows = -(-(len(panels) - 1) // columns)
    with writing([*of, *_names(panels)], _SETTINGS, svg=False) as written:
        figure = Figure(figsize=(13, 4.6 + 3.2 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1 + rows, columns, height_ratios=[4.2, *[3.0] * rows])
        figure.suptitle(", ".join(map(written, of)), x=0.01, ha="left", fontweight="bold")
        for number, each in enumerate(panels):
            place = grid[0, :] if number == 0 else grid[1 + (number - 1) // columns, (number - 1) % columns]
            axes = figure.add_subplot(place)
            _clean(axes)
            _draw(axes, each, written)
            axes.set_title(each.title, loc="left", fontsize=11)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


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
    with writing([*series, *(levels or {})], _SETTINGS, svg=True) as written:
        figure, axes = _figure(7.5, 3.6)
        for number, (label, (xs, ys)) in enumerate(series.items()):
            look: dict[str, Any] = {**_look(number), "linewidth": 1.8, "markersize": 4}
            axes.plot(xs, ys, label=written(label), marker="o" if len(xs) < 20 else None, **look)
        for (label, height), colour in zip((levels or {}).items(), reversed(_COLOURS), strict=False):
            axes.axhline(height, label=written(label), color=colour, linestyle="--", linewidth=1.2)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(frameon=False)
        return _svg(figure)


def bars(values: Mapping[str, float], *, y: str, digits: int = 3) -> str:
    """One bar for each label, its value above it; the axis starts at 0."""
    with writing(list(values), _SETTINGS, svg=True) as written:
        figure, axes = _figure(7.5, 3.2)
        heights = list(values.values())
        drawn = axes.bar(range(len(values)), heights, color=_COLOURS[: len(values)], width=0.6)
        axes.bar_label(drawn, labels=[f"{height:,.{digits}f}" for height in heights], padding=3)
        axes.set_xticks(range(len(values)), [written(label) for label in values])
        axes.margins(y=0.15)
        axes.set_ylabel(y)
        axes.grid(visible=False, axis="x")
        return _svg(figure)


def _names(panels: Sequence[Panel]) -> list[str]:
    """What stands in the panels' legends."""
    found = [line.label for each in panels for line in each.lines if line.label is not None]
    return list(dict.fromkeys([*found, *(mark.label for each in panels for mark in each.marks)]))


def _draw(axes: Any, drawn: Panel, written: Callable[[str], str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in drawn.lines:
        xs, ys = thinned(line.xs, line.ys) if line.kind != "points" else (line.xs, line.ys)
        look: dict[str, Any] = {**_look(line.colour), "linewidth": 1.8, "zorder": 3}
        if line.kind == "faint":
            look |= {"alpha": 0.28, "linewidth": 0.9, "zorder": 2}
        elif line.kind == "thin":
            look |= {"linewidth": 1.1}
        elif line.kind == "points":
            look |= {"marker": "o", "markersize": 4 if len(xs) < 60 else 2, "linewidth": 1.2, "zorder": 4}
        axes.plot(xs, ys, label=None if line.label is None else written(line.label), **look)
    labelled: set[str] = set()
    for mark in drawn.marks:
        axes.plot(
            [mark.x],
            [mark.y],
            linestyle="",
            marker=mark.shape,
            markersize=11 if mark.shape == "*" else 7,
            color=_COLOURS[mark.colour % len(_COLOURS)],
            markeredgecolor="black",
            markeredgewidth=0.7,
            zorder=5,
            label=None if mark.label in labelled else written(mark.label),
        )
        labelled.add(mark.label)
    axes.set_xlabel(drawn.x)
    axes.set_ylabel(drawn.y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(_short)
    if drawn.log:
        axes.set_yscale("log")
    elif drawn.zero:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_short)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most some hundred points of a curve, with the lowest and the highest of each stretch among them."""
    n = len(xs)
    if n <= _MOST_POINTS:
        return list(xs), list(ys)
    kept = {0, n - 1}
    stretches = _MOST_POINTS // 2
    for number in range(stretches):
        stretch = range(number * n // stretches, (number + 1) * n // stretches)
        kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    order = sorted(kept)
    return [xs[at] for at in order], [ys[at] for at in order]


def _look(number: int) -> dict[str, str]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _short(value: float, _: Any) -> str:
    """12,000 as 12k, so that the numbers of an axis do not run into each other."""
    for size, end in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{end}"
    return f"{value:g}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    _clean(axes)
    return figure, axes


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    # Only the element itself: the page has a declaration and a document type of its own.
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)
