"""The quickstart's page: the table, the curves, what was cut and what the models write."""

from __future__ import annotations

from collections.abc import Sequence

from lathe.quickstart.run import Journey, Row
from lathe.report.html import Page
from lathe.report.plots import bars, curves

HEADER = ("model", "parameters", "bytes on disk", "validation loss", "tokens/s")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells as text, differences against the first row included."""
    parent = rows[0]
    out: list[tuple[str, ...]] = []
    for row in rows:
        share = "" if row is parent else f" {row.parameters / parent.parameters - 1:+.0%}"
        more = "" if row is parent else f" {row.loss - parent.loss:+.3f}"
        speed = "" if row is parent else f" ×{row.tokens_per_second / parent.tokens_per_second:.2f}"
        out.append(
            (
                row.name,
                f"{row.parameters:,}{share}",
                f"{row.bytes:,}",
                f"{row.loss:.3f}{more}",
                f"{row.tokens_per_second:,.0f}{speed}",
            )
        )
    return out


def page(journey: Journey) -> str:
    """The whole report as HTML."""
    made = Page("Lathe quickstart", f"{journey.family}, seed {journey.seed}, {journey.seconds:.0f} seconds")
    made.text(
        "One model was trained from scratch, cut to size and healed. Every number below was measured in this run; "
        "the loss is the mean over held-out documents, in nats per predicted token."
    )
    made.table(HEADER, cells(journey.rows), marked=len(journey.rows) - 1)
    made.picture(
        bars({row.name: row.loss - journey.rows[0].loss for row in journey.rows[1:]}, y="nats above the parent"),
        "What each cut lost: a plain truncation keeps the first channels; the rotation keeps the directions in which "
        "the model moves most; healing learns from the parent for a few steps.",
    )
    made.heading("What the cut did")
    for step in journey.steps:
        kind = "exact" if step["exact"] else "approximate"
        kept = {k: v for k, v in step.items() if k not in ("name", "exact")}
        made.text(f"{step['name']} ({kind})")
        if kept:
            made.text("The share of the stream's second moment that each norm still sees:")
            made.facts({name: f"{value:.4f}" for name, value in kept.items()})
    made.text(f"After a reload from disk the largest difference of a logit is {journey.reload_error:g}.")
    made.heading("Training")
    for title, points in journey.curves.items():
        losses = {"loss on the batch": ([x for x, _ in points], [y for _, y in points])}
        caption = "The parent learns." if title == "train" else "The cut model learns from the parent and the text."
        made.picture(curves(losses, x="step", y="nats a token"), caption)
    made.heading("What the models write")
    made.text("Sentences that were held out. A small model trained for minutes knows the style better than the facts.")
    answers = list(journey.examples[0].answers) if journey.examples else []
    made.table(
        ("shown", "the text", *answers),
        [(e.shown, e.truth, *(e.answers[name] for name in answers)) for e in journey.examples],
    )
    made.heading("The run")
    made.facts(journey.facts)
    return made.render()
