"""A resized model's page (`report.html`) and its model card (`README.md`), from what the resize measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lathe._version import __version__
from lathe.planner.quantities import typed
from lathe.report.card import header, reload_sentences, table
from lathe.report.frontier import Point, frontier_svg
from lathe.report.html import Page
from lathe.report.plots import curves
from lathe.reshape.budget_table import ALONE, PLAN, alone_cells, plan_cells, sentences
from lathe.reshape.heal import HealSettings
from lathe.reshape.history import UNKNOWN
from lathe.reshape.measure import Quality
from lathe.reshape.outcome import Done, Outcome, Size
from lathe.reshape.recipe import Recipe
from lathe.reshape.state import ENDS

_MOST_DETAILS = 48  # rows of one table; more are drawn as a curve, and the lowest are named
_LOSS, _BITS = "loss, nats a target", "bits a byte of text"
_OTHER_TOKENS = (
    "The tokenizer changed, so losses a token do not compare before and after: long tokens are harder than short ones."
)


def pages(outcome: Outcome, recipe: Recipe) -> dict[str, str]:
    """The files that describe a result, name to content."""
    return {"report.html": page(outcome, recipe), "README.md": card(outcome, recipe)}


def page(outcome: Outcome, recipe: Recipe) -> str:
    """The report as one HTML file."""
    made = Page(_title(outcome), _made_by(outcome))
    made.text(_summary(outcome))
    made.table(*size_table(outcome), marked=1)
    points, y = _points(outcome)
    if len(points) > 1:
        made.picture(
            frontier_svg(points, y=y, in_order=True),
            f"{y.split(',')[0].capitalize()} against parameters, from the source through each step. Lower and further "
            "left is better.",
        )
    made.heading("Steps")
    made.text(
        "An exact step leaves every output as it was, up to rounding. “Logits moved” is the root mean square of their "
        "change over that of the logits before the step; the loss is that of the model after it."
    )
    made.table(STEPS, [["" if cell == "–" else cell for cell in row] for row in step_cells(outcome)])
    for line in step_notes(outcome):
        made.text(line)
    _details(made, outcome.steps)
    made.heading("Opened again from the disk")
    for line in reload_lines(outcome):
        made.text(line)
    if recipe.budget is not None:
        made.heading("How the budget was spent")
        made.table(PLAN, plan_cells(recipe.budget))
        made.text("Every axis that meets the budget by itself, and the plan:")
        made.table(ALONE, alone_cells(recipe.budget))
        for line in sentences(recipe.budget):
            made.text(line)
    if outcome.curves:
        made.heading("Healing")
        lines = {title: ([x for x, _ in points], [y for _, y in points]) for title, points in outcome.curves.items()}
        healed = [HealSettings.from_dict(stage["heal"]) for stage in recipe.stages if "heal" in stage]
        losses = " or ".join(dict.fromkeys(each.loss_in_words for each in healed))
        drawn = curves(lines, x="step", y="loss on the batch")
        made.picture(drawn, f"The loss is {losses}, so it is not the loss of the table.")
    made.heading("How it was made")
    if outcome.text:
        made.facts(outcome.text)
    if recipe.obstacle:
        made.text(f"lathe.json says how it was made. It cannot be done again from files: {recipe.obstacle}.")
    else:
        made.text("lathe.json holds the recipe. This makes the same bytes again, from the same source and text:")
        made.code(_replay(outcome, recipe))
    return made.render()


def card(outcome: Outcome, recipe: Recipe) -> str:
    """The model card, with the header that the Hugging Face hub reads."""
    lines = [
        *header(outcome.card, made="resized", family=outcome.family, base=outcome.base),
        "",
        f"# {outcome.result.name}",
        "",
        _summary(outcome),
        "",
        *table(*size_table(outcome)),
        "",
        "## Steps",
        "",
        *table(STEPS, step_cells(outcome)),
        "",
        "Exact: every output as it was, up to rounding. The change of the logits is relative, root mean square.",
        "",
        *(paragraph for line in step_notes(outcome) for paragraph in (line, "")),
        "## Opened again from the disk",
        "",
        *reload_lines(outcome),
        "",
        "## How it was made",
        "",
        *(f"- {name}: {value}" for name, value in outcome.text.items()),
        "",
        *_again(outcome, recipe),
        "",
    ]
    return "\n".join(lines)


# --- cells, which the command line prints as well


_SIZES = ("model", "parameters", "bytes of weights", "loss", "perplexity", "bits/byte", "tokens/s")
STEPS = ("step", "kind", "logits moved", "parameters", "loss after", "change")


def size_table(outcome: Outcome) -> tuple[list[str], list[tuple[str, ...]]]:
    """A header, and source and result below each other with their differences; empty columns are left out."""
    rows = _size_cells(outcome.source, outcome.result, outcome.is_comparable)
    kept = [column for column in range(len(_SIZES)) if any(row[column] != "–" for row in rows)]
    return [_SIZES[column] for column in kept], [tuple(row[column] for column in kept) for row in rows]


def _size_cells(source: Size, result: Size, is_comparable: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for size in (source, result):
        first = size is source
        found, before = size.quality, source.quality
        speed, speed_before = size.tokens_per_second, source.tokens_per_second
        rows.append(
            (
                size.name,
                f"{size.parameters:,}" + ("" if first else f" {size.parameters / source.parameters - 1:+.0%}"),
                f"{size.bytes:,}",
                _number(found, lambda q: q.loss) + _plus(first or not is_comparable, found, before),
                _number(found, lambda q: q.perplexity, 2),
                _number(found, lambda q: q.bits_per_byte),
                "–"
                if speed is None
                else f"{speed:,.0f}" + ("" if first or not speed_before else f" ×{speed / speed_before:.2f}"),
            )
        )
    return rows


def step_cells(outcome: Outcome) -> list[tuple[str, ...]]:
    """Each step: what it was, whether it is exact, and what it cost."""
    before = outcome.source.quality
    rows: list[tuple[str, ...]] = []
    for number, step in enumerate(outcome.steps, start=1):
        moved = "with the next" if step.change is None and _goes_on(outcome.steps, number) else _share(step.change)
        difference = ""
        if step.quality is not None and before is not None:
            difference = "other tokens" if step.renumbers else f"{step.quality.loss - before.loss:+.4f}"
        rows.append(
            (
                f"{number}. {step.name}",
                "heals" if step.heals else "exact" if step.exact else "approximate",
                moved,
                f"{step.parameters:,}",
                _number(step.quality, lambda q: q.loss),
                difference,
            )
        )
        before = step.quality or before
    return rows


def step_notes(outcome: Outcome) -> list[str]:
    """What else is to be known about single steps, as sentences."""
    return [f"Step {number}: {step.note}." for number, step in enumerate(outcome.steps, start=1) if step.note]


def reload_lines(outcome: Outcome) -> list[str]:
    """What was found when the files were opened again, as sentences."""
    return reload_sentences(outcome.reload, outcome.reasons)


# --- parts


def _made_by(outcome: Outcome) -> str:
    """Which program, and how long it took where that was counted: a model saved from Python took its time before."""
    took = f" in {outcome.seconds:,.0f} seconds" if outcome.seconds else ""
    return f"made by Lathe {__version__}{took}"


def _title(outcome: Outcome) -> str:
    return f"{outcome.source.name} → {outcome.result.name}"


def _summary(outcome: Outcome) -> str:
    source, result = outcome.source, outcome.result
    sizes = ", ".join(f"{name}={typed(value)}" for name, value in outcome.changes.items())
    text = (
        f"{source.name} with {sizes}: {result.parameters:,} parameters "
        f"({result.parameters / source.parameters:.0%} of the source's {source.parameters:,})"
    )
    before, after = source.quality, result.quality
    if before is not None and after is not None:
        where = outcome.text.get("measured on", "held-out text")
        if outcome.is_comparable:
            text += f", perplexity {after.perplexity / before.perplexity - 1:+.1%} on {where}"
        elif before.bits_per_byte is not None and after.bits_per_byte is not None:
            text += f", bits per byte {after.bits_per_byte / before.bits_per_byte - 1:+.1%} on {where}"
    form = f"stock {outcome.family} files" if outcome.family else "Lathe's own form"
    note = "" if outcome.is_comparable else f" {_OTHER_TOKENS}"
    if UNKNOWN in outcome.text and not outcome.is_comparable:
        note += f" Bits a byte say too little where text is {UNKNOWN}: {outcome.text[UNKNOWN]}."
    return f"{text}. Saved as {form}.{note}"


def _points(outcome: Outcome) -> tuple[list[Point], str]:
    """The source and each step on the plane of parameters and loss (or bits per byte, where tokens changed)."""
    found = [("source", outcome.source.parameters, outcome.source.quality)]
    found += [(f"{n}. {step.name}", step.parameters, step.quality) for n, step in enumerate(outcome.steps, start=1)]
    measured = [(name, parameters, quality) for name, parameters, quality in found if quality is not None]
    if outcome.is_comparable:
        return [Point(name, parameters, quality.loss) for name, parameters, quality in measured], _LOSS
    bits = [(name, parameters, quality.bits_per_byte) for name, parameters, quality in measured]
    return [Point(name, parameters, value) for name, parameters, value in bits if value is not None], _BITS


def _details(made: Page, steps: Sequence[Done]) -> None:
    """What the steps measured of themselves: a table for each kind of number, a column for each step."""
    kinds: dict[str, list[tuple[int, Done]]] = {}
    for number, step in enumerate(steps, start=1):
        if step.detail:
            kinds.setdefault(step.measures or "what the step measured of itself", []).append((number, step))
    for told, mine in kinds.items():
        measures, ends, whole = told.partition(ENDS)
        if ends:
            for number, step in mine:
                before, after = (_detail(step.detail, name) for name in _WHOLE)
                made.text(f"Step {number}, before and after: {before} and {after}, {whole}.")
        parts = [(number, step, _parts(step, is_split=bool(ends))) for number, step in mine]
        names = list(dict.fromkeys(name for *_, part in parts for name in part))
        if not names:
            continue
        made.text(f"{measures[0].upper()}{measures[1:]}:")
        if len(names) > _MOST_DETAILS:
            lines = {f"{n}. {s.name}": (range(1, len(part) + 1), list(part.values())) for n, s, part in parts}
            made.picture(curves(lines, x="place in the model", y=""), measures)
            last = parts[-1][2]
            names = sorted(last, key=lambda name: last[name])[:8]
            made.text("The lowest of them:")
        rows = [(name, *(_detail(part, name) for *_, part in parts)) for name in names]
        made.table(("", *(f"step {number}" for number, _ in mine)), rows)


_WHOLE = ("before", "after")


def _parts(step: Done, *, is_split: bool) -> dict[str, float]:
    """A step's numbers for parts of the model, without those that stand for the whole step."""
    return {name: value for name, value in step.detail.items() if not (is_split and name in _WHOLE)}


def _detail(numbers: Mapping[str, float], name: str) -> str:
    return f"{numbers[name]:.4f}" if name in numbers else ""


def _goes_on(steps: Sequence[Done], number: int) -> bool:
    """Whether a step was measured together with the one after it."""
    return number < len(steps) and steps[number - 1].quality is None and not steps[number].heals


def _again(outcome: Outcome, recipe: Recipe) -> list[str]:
    """The recipe's lines in the card."""
    if recipe.obstacle:
        return [
            f"`lathe.json` says how; it cannot be done again from files: {recipe.obstacle}. `report.html` has plots."
        ]
    told = "`lathe.json` is the recipe; `report.html` has the plots. The same bytes again:"
    return [told, "", "```", _replay(outcome, recipe), "```"]


def _replay(outcome: Outcome, recipe: Recipe) -> str:
    words = ["lathe", "resize", str(recipe.source["model"]), "NEW", "--recipe", f"{outcome.result.name}/lathe.json"]
    if recipe.calibrate is not None:
        words += ["--calibrate", str(recipe.calibrate["file"])]
    if recipe.vocabulary is not None and recipe.vocabulary.get("file") is not None:
        words.append(f"vocabulary={recipe.vocabulary['file']}")
    healed: Mapping[str, Any] | None = next((stage["heal"] for stage in recipe.stages if "heal" in stage), None)
    if healed is not None:
        words += ["--heal", str(healed["file"])]
    return shlex.join(words)


def _number(found: Quality | None, read: Any, digits: int = 4) -> str:
    value = None if found is None else read(found)
    return "–" if value is None else f"{value:,.{digits}f}"


def _plus(first: bool, found: Quality | None, before: Quality | None) -> str:
    return "" if first or found is None or before is None else f" {found.loss - before.loss:+.4f}"


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"
