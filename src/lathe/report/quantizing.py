"""A quantised model's page (`report.html`) and its model card (`README.md`), from what quantising measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lathe._version import __version__
from lathe.quantization.outcome import Outcome
from lathe.report.card import header, reload_sentences, table
from lathe.report.html import Page
from lathe.reshape.recipe import Recipe
from lathe.reshape.text import TextSettings

WORST = ("layer", "bits", "output off by", "bytes before", "bytes after")
_LISTED = 24  # layers on the page


def pages(outcome: Outcome, recipe: Recipe) -> dict[str, str]:
    """The files that describe a result, name to content."""
    return {"report.html": page(outcome, recipe), "README.md": card(outcome, recipe)}


def page(outcome: Outcome, recipe: Recipe) -> str:
    """The report as one HTML file."""
    title = f"{outcome.source.name} → {outcome.result.name}"
    made = Page(title, f"made by Lathe {__version__} in {outcome.seconds:,.0f} seconds")
    made.text(summary(outcome))
    made.table(*size_rows(outcome), marked=1)
    made.heading("The worst layers")
    made.text(_what_errors_are(outcome))
    made.table(WORST, worst_rows(outcome, _LISTED))
    for line in proposal_lines(outcome):
        made.text(line)
    made.heading("Opened again from the disk")
    for line in reload_lines(outcome):
        made.text(line)
    made.heading("How it was made")
    if outcome.facts:
        made.facts(outcome.facts)
    made.code(_command(outcome, recipe))
    return made.render()


def card(outcome: Outcome, recipe: Recipe) -> str:
    """The model card, with the header that the Hugging Face hub reads."""
    lines = [
        *header(outcome.card, made="quantized", family=outcome.family, base=outcome.base),
        "",
        f"# {outcome.result.name}",
        "",
        summary(outcome),
        "",
        *table(*size_rows(outcome)),
        "",
        "## The worst layers",
        "",
        _what_errors_are(outcome),
        "",
        *table(WORST, worst_rows(outcome, 8)),
        "",
        *proposal_lines(outcome),
        "",
        "## Opened again from the disk",
        "",
        *reload_lines(outcome),
        "",
        "## How it was made",
        "",
        *(f"- {name}: {value}" for name, value in outcome.facts.items()),
        "",
        "```",
        _command(outcome, recipe),
        "```",
        "",
    ]
    return "\n".join(lines)


# --- cells and lines, which the command line prints as well


def size_rows(outcome: Outcome) -> tuple[list[str], list[tuple[str, ...]]]:
    """A header, and source and result below each other; the loss where it was measured."""
    source, result = outcome.source, outcome.result
    header = ["model", "bytes of weights"]
    rows = [
        [source.name, f"{source.bytes:,}"],
        [result.name, f"{result.bytes:,} ×{result.bytes / source.bytes:.2f}"],
    ]
    if source.quality is not None and result.quality is not None:
        header += ["loss", "perplexity"]
        change = outcome.loss_change
        rows[0] += [f"{source.quality.loss:.4f}", f"{source.quality.perplexity:,.2f}"]
        rows[1] += [f"{result.quality.loss:.4f} {change:+.2%}", f"{result.quality.perplexity:,.2f}"]
    return header, [tuple(row) for row in rows]


def worst_rows(outcome: Outcome, most: int) -> list[tuple[str, ...]]:
    """The layers whose output is the furthest off."""
    return [
        (
            layer.name,
            f"{layer.bits}" + (f", groups of {layer.group_size}" if layer.group_size else ""),
            f"{layer.error:.2%}",
            f"{layer.bytes_before:,}",
            f"{layer.bytes_after:,}",
        )
        for layer in outcome.layers[:most]
    ]


def proposal_lines(outcome: Outcome) -> list[str]:
    """Which layers would be worth keeping, as sentences."""
    if outcome.source.quality is None:
        if "loss" in outcome.facts:
            return [f"The loss was {outcome.facts['loss']}."]
        return ["No loss was measured: give text with --data FILE to see what it cost and which layers to keep."]
    if not outcome.proposals:
        return ["Leaving any one of the worst layers alone would win next to nothing."]
    return [
        f"--keep {each.name}: the loss would be {each.gain:.4f} lower, for {each.bytes:,} bytes more."
        for each in outcome.proposals
    ]


def reload_lines(outcome: Outcome) -> list[str]:
    """What was found when the files were opened again, as sentences."""
    return reload_sentences(outcome.reload, outcome.reasons)


def summary(outcome: Outcome) -> str:
    """What was done and what it cost, in one sentence or two."""
    how, share = outcome.settings, outcome.result.bytes / outcome.source.bytes
    inputs = " with int8 activations" if how["activations"] == "int8" else ""
    group = f" in groups of {how['group']}" if how["group"] else ""
    text = f"{outcome.source.name} in {how['bits']} bits{group}{inputs}: {share:.0%} of the source's bytes"
    if outcome.loss_change is not None:
        text += f", loss {outcome.loss_change:+.2%} on {outcome.facts.get('measured on', 'held-out text')}"
    kept = f" Left as they were: {', '.join(outcome.kept)}." if outcome.kept else ""
    form = f"stock {outcome.family} files (compressed-tensors)" if outcome.family else "Lathe's own form"
    return f"{text}. Saved as {form}.{kept}"


def _what_errors_are(outcome: Outcome) -> str:
    if "codes chosen on" in outcome.facts:
        return (
            "How far each layer's output is off on the text, relative; a token table has no text of its own, and its "
            "rows are compared."
        )
    return "How far each matrix is off, relative: no calibration text was given."


def _command(outcome: Outcome, recipe: Recipe) -> str:
    how = dict(outcome.settings)
    words = ["lathe", "quantize", str(recipe.source["model"]), "NEW", "--bits", str(how["bits"])]
    words += ["--method", str(how["method"]), "--activations", str(how["activations"]), "--group", str(how["group"])]
    words += ["--symmetric" if how["symmetric"] else "--asymmetric", "--tables", str(how["tables"])]
    words += [part for layer in how["keep"] for part in ("--keep", str(layer))]
    words += _text("calibrate", recipe.calibrate) + _text("data", outcome.data)
    words += [f"objective{'' if key == 'name' else f'.{key}'}={value}" for key, value in recipe.objective.items()]
    words += [f"seed={recipe.seed}"] if recipe.seed else []
    return shlex.join(words)


def _text(name: str, settings: Mapping[str, Any] | None) -> list[str]:
    """The words that give a text: its file, and what is not as usual."""
    if settings is None:
        return []
    usual = TextSettings(file=settings["file"]).to_dict()
    others = [f"{name}.{key}={settings[key]}" for key in usual if settings.get(key, usual[key]) != usual[key]]
    return [f"--{name}", str(settings["file"]), *others]
