"""Any models on the same text, side by side: `lathe compare`.

Every model is shown the same documents, through its own tokenizer and as its own objective wants them. Losses are per
token, so they can be compared where the tokenizer and the objective are the same; bits per byte, which causal models
have, can be compared always. The page says which it is. Speeds are measured in turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lathe._version import __version__
from lathe.checkpoint.atomic import atomic_directory
from lathe.errors import RequestError
from lathe.objectives.base import Objective
from lathe.planner.quantities import bytes_text
from lathe.report.frontier import Point, best, frontier_svg, write_frontier_png
from lathe.report.html import Page
from lathe.reshape.job import Reporter, Silent
from lathe.reshape.measure import Quality, parameters_of, quality, speeds, weight_bytes
from lathe.reshape.outcome import finite
from lathe.reshape.source import Source, open_source
from lathe.reshape.text import Documents, Text, TextSettings, lay, read_documents, row_length
from lathe.text.tokenizer import Tokenizer
from lathe.text.use import use_of
from lathe.train.machine import pick_device

_HEADER = ("model", "parameters", "weights", "loss", "perplexity", "bits/byte", "tokens/s")


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        loss: nats a target.
        bits_per_byte: of a causal model.
        objective: what it predicts.
        tokenizer: the first digits of a digest of what its tokenizer makes of the text.
        unknown: the share of the text's pieces that are unknown to it, which are easily guessed and say nothing.
    """

    name: str
    parameters: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens_per_second: float
    objective: str
    tokenizer: str
    unknown: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Models on one text.

    Args:
        documents, digest: how many documents, and their SHA-256.
        length: positions of a row, the same for every model.
        measure: what is compared, `loss` or `bits_per_byte`.
        note: why losses of some of them cannot be compared; empty where they can.
    """

    rows: tuple[Row, ...]
    data: str
    documents: int
    digest: str
    length: int
    measure: str
    note: str

    @property
    def points(self) -> list[Point]:
        """The models on the plane of parameters and what is compared."""
        return [Point(row.name, row.parameters, float(getattr(row, self.measure))) for row in self.rows]

    @property
    def y(self) -> str:
        """What is compared, with its unit."""
        return "bits a byte of text" if self.measure == "bits_per_byte" else "loss, nats a target"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; an infinite number is None."""
        plain: dict[str, Any] = finite({**asdict(self), "frontier": [point.name for point in best(self.points)]})
        return plain


def compare(
    models: Sequence[str],
    data: TextSettings,
    *,
    objective: Mapping[str, Any] | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Comparison:
    """Measure models on the same text.

    Args:
        models: directories or hub ids.
        objective: what they predict; what each one's head says where left out.

    Raises:
        RequestError: no such model, no tokenizer, a model that predicts no token, or a name twice.
    """
    if len(set(models)) < len(models):
        raise RequestError(f"{next(name for name in models if models.count(name) > 1)} is named twice; name it once")
    say = (reporter or Silent()).say
    where = pick_device(device)
    opened = [open_source(name, quantized=True) for name in models]
    for each in opened:
        if each.tokenizer is None:
            raise RequestError(f"{each.name} holds no tokenizer to read the text with; put its tokenizer beside it")
    assert opened[0].tokenizer is not None
    documents, _ = read_documents(data, opened[0].tokenizer, apart=False)
    # Rows of one length for all: a longer one shows a model more of what stands before, and takes longer to read.
    data = replace(data, length=min(row_length(data, each.model.architecture) for each in opened))
    texts: dict[str, Text] = {}
    found: dict[str, Quality] = {}
    for each in opened:
        assert each.tokenizer is not None
        each.model.to(where)
        texts[each.name] = lay(documents, data, each.model.architecture, each.tokenizer, objective)
        measured = quality(each.model, texts[each.name])
        if measured is None:
            raise RequestError(f"{each.name} predicts no tokens, so it has no loss on text; leave it out")
        found[each.name] = measured
        say(f"{each.name}: loss {measured.loss:.4f}")
    speed = speeds({each.name: (each.model, texts[each.name].batches) for each in opened})
    rows = tuple(_row(each, found[each.name], speed[each.name], texts[each.name], documents) for each in opened)
    measure, note = _judged(rows)
    assert data.length is not None
    return Comparison(rows, data.file, len(documents.texts), documents.digest, data.length, measure, note)


def _row(source: Source, found: Quality, speed: float, text: Text, documents: Documents) -> Row:
    assert text.objective is not None
    assert source.tokenizer is not None
    assert source.directory is not None
    return Row(
        source.name,
        parameters_of(source.model),
        weight_bytes(source.directory),
        found.loss,
        found.perplexity,
        found.bits_per_byte,
        speed,
        text.objective.name,
        _spelling(source.tokenizer, documents, text.objective),
        _unknown(source, documents),
    )


def _unknown(source: Source, documents: Documents) -> float:
    """The share of the text's pieces that a model does not know; RequestError where it knows less than half."""
    assert source.tokenizer is not None
    try:
        return use_of(source.tokenizer, [*documents.texts, *(documents.targets or ())]).unknown
    except RequestError as error:
        raise RequestError(f"{source.name}: {error}; leave it out") from None


def _spelling(tokenizer: Tokenizer, documents: Documents, objective: Objective) -> str:
    """A digest of the ids that a tokenizer makes of the text, and of the marks and settings that the objective adds.

    Not of its files: they may differ in what makes no difference here.
    """
    ids = hashlib.sha256(json.dumps(objective.to_dict(), sort_keys=True).encode())
    for side in (documents.texts, documents.targets or ()):
        for row in tokenizer.encode_batch(list(side)):
            ids.update(f"{row}\n".encode())
    return ids.hexdigest()[:12]


def _judged(rows: Sequence[Row]) -> tuple[str, str]:
    """What the rows can be compared by, and what cannot."""
    if len({row.tokenizer for row in rows}) == 1 and len({row.objective for row in rows}) == 1:
        return "loss", ""
    if all(row.bits_per_byte is not None for row in rows):
        blind = ", ".join(f"{row.name} reads {row.unknown:.1%} of its pieces" for row in rows if row.unknown)
        less = f" Where text is unknown they say too little: {blind} as unknown." if blind else ""
        return "bits_per_byte", f"The tokenizers differ, so losses a token do not compare; bits a byte do.{less}"
    return "loss", (
        "The models have different tokenizers or objectives, so their losses do not compare: "
        + "; ".join(f"{row.name} is {row.objective} with tokenizer {row.tokenizer}" for row in rows)
        + "."
    )


def table(comparison: Comparison) -> tuple[list[str], list[tuple[str, ...]]]:
    """A header and a row for each model; differences are against the first. Empty columns are left out."""
    rows = _cells(comparison)
    kept = [column for column in range(len(_HEADER)) if any(row[column] != "–" for row in rows)]
    return [_HEADER[column] for column in kept], [tuple(row[column] for column in kept) for row in rows]


def _cells(comparison: Comparison) -> list[tuple[str, ...]]:
    first = comparison.rows[0]
    rows: list[tuple[str, ...]] = []
    for row in comparison.rows:
        other = row is not first
        comparable = other and comparison.measure == "loss" and not comparison.note
        rows.append(
            (
                row.name,
                f"{row.parameters:,}" + (f" {row.parameters / first.parameters - 1:+.0%}" if other else ""),
                bytes_text(row.bytes),
                f"{row.loss:.4f}" + (f" {row.loss - first.loss:+.4f}" if comparable else ""),
                f"{row.perplexity:,.2f}",
                "–" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
                f"{row.tokens_per_second:,.0f}"
                + (f" ×{row.tokens_per_second / first.tokens_per_second:.2f}" if other else ""),
            )
        )
    return rows


def page(comparison: Comparison) -> str:
    """The comparison as one HTML file."""
    made = Page(f"{len(comparison.rows)} models on {comparison.data}", f"measured by Lathe {__version__}")
    made.text(f"{comparison.documents:,} documents, the same for every model. {comparison.note}".rstrip())
    made.table(*table(comparison))
    made.picture(
        frontier_svg(comparison.points, y=comparison.y),
        "Down and to the left is better. The line joins the models that no other beats in both.",
    )
    made.heading("What was measured")
    made.facts(
        {
            "text": f"{comparison.data}, SHA-256 of the documents {comparison.digest[:16]}…",
            "rows": f"of {comparison.length} positions at most",
            "on the frontier": ", ".join(point.name for point in best(comparison.points)),
            **{row.name: f"{row.objective}, tokenizer {row.tokenizer}" for row in comparison.rows},
        }
    )
    return made.render()


def write(comparison: Comparison, folder: Path) -> None:
    """`compare.html`, `frontier.png` and `compare.json` in a directory that does not exist yet.

    Raises:
        RequestError: it exists and is not empty.
        LatheError: the disk is full; nothing is left.
    """
    with atomic_directory(folder) as made:
        (made / "compare.html").write_text(page(comparison), encoding="utf-8")
        text = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False)
        (made / "compare.json").write_text(text + "\n", encoding="utf-8")
        write_frontier_png(comparison.points, made / "frontier.png", y=comparison.y)
