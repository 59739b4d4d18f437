"""A budget's plan as cells and sentences, from the plain values that the recipe holds too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lathe.planner.quantities import bytes_text, count_text, written
from lathe.reshape.budget_axes import GIVEN

PLAN = ("axis", "from", "to", "saved", "loss with this cut alone", "price of a deep cut")
ALONE = ("axis", "size", "takes", "loss", "change")


def amount(plan: Mapping[str, Any], value: float) -> str:
    """A number of what the budget limits, as people write it."""
    if plan["unit"] == "milliseconds":
        return f"{value:.3g} ms"
    return bytes_text(value) if plan["unit"] == "bytes" else count_text(value)


def plan_cells(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Each axis, from what to what, what that saves and costs; all of them together in the last row."""
    rows: list[tuple[str, ...]] = []
    for row in plan["rows"]:
        cut = row["new"] != row["old"]
        loss = "–" if row["loss"] is None else f"{'' if row['is_measured'] else '≈ '}{row['loss']:.4f}"
        saved = f"{amount(plan, row['saved'])} ({row['saved'] / plan['before']:.0%})" if cut else "–"
        rows.append((row["label"], f"{row['old']:,}", f"{row['new']:,}", saved, loss, str(row["why"])))
    saved = plan["before"] - plan["after"]
    rows.append(
        (
            "together",
            amount(plan, plan["before"]),
            amount(plan, plan["after"]),
            f"{amount(plan, saved)} ({saved / plan['before']:.0%})",
            f"{plan['loss']:.4f}",
            f"measured, {plan['loss'] - plan['loss_before']:+.4f} from {_start(plan)}",
        )
    )
    return rows


def alone_cells(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Each axis that meets the budget by itself, the plan below them."""
    before = plan["loss_before"]
    ranked = sorted(plan["alone"], key=lambda each: each["loss"])
    rows = [
        (e["label"], f"{e['size']:,}", amount(plan, e["cost"]), f"{e['loss']:.4f}", f"{e['loss'] - before:+.4f}")
        for e in ranked
    ]
    change = f"{plan['loss'] - before:+.4f}"
    return [*rows, ("the plan", _typed(plan), amount(plan, plan["after"]), f"{plan['loss']:.4f}", change)]


def _typed(plan: Mapping[str, Any]) -> str:
    """The sizes as they are typed; an older recipe holds them by their whole paths alone."""
    return str(plan.get("written") or written(plan["changes"]))


def _start(plan: Mapping[str, Any]) -> str:
    """The loss that the plan is measured from, and whose it is."""
    loss = f"{plan['loss_before']:.4f}"
    return f"{loss} with {plan['given']}" if plan.get("given") else f"the source's {loss}"


def sentences(plan: Mapping[str, Any]) -> list[str]:
    """What the tables do not say."""
    given = plan.get("given")
    first = f"{amount(plan, plan['before'])} with {given}" if given else amount(plan, plan["before"])
    lines = [f"Budget: {amount(plan, plan['limit'])} of {first}."]
    if given:
        lines.append(f"Given: {given}; what the rest costs is measured from there.")
    lines.append(
        f"{len(plan['trials'])} trials, each cut for real and measured: {plan['measured_on']}, in nats for each token "
        "of the source's tokenizer."
    )
    if plan["timed"]:
        lines.append(f"Timed: {plan['timed']}.")
    alone = min(plan["alone"], key=lambda each: each["loss"], default=None)
    if alone is None:
        lines.append("No single axis meets the budget.")
    else:
        lines.append(
            f"Best single axis: {alone['label']} at {alone['size']:,}, loss {alone['loss']:.4f}; "
            f"the plan: {plan['loss']:.4f} ({plan['loss'] - alone['loss']:+.4f})."
        )
    lines += [f"Not cut, {label}: {why}." for label, why in plan["without"].items() if why != GIVEN]
    return lines


def text(plan: Mapping[str, Any]) -> str:
    """The plan as two tables and sentences: axis by axis, and beside every single axis that meets the budget."""
    tables = [*_aligned([PLAN, *plan_cells(plan)]), "", *_aligned([ALONE, *alone_cells(plan)])]
    return "\n".join([*tables, "", *sentences(plan)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
