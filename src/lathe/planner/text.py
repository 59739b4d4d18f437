"""A plan as text: one table, before beside after, and then the consequences in sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lathe.architecture import Architecture
from lathe.planner.costs import Costs
from lathe.planner.quantities import bytes_text, count_text, flops_text, seconds_text, written

if TYPE_CHECKING:
    from lathe.planner import Plan, Timing

_COMPONENTS = {
    "token_embedding": "token embedding",
    "positions": "positions",
    "attention": "attention",
    "cross_attention": "cross-attention",
    "feed_forward": "feed-forward",
    "norms": "norms",
    "head": "head",
}
_OPTIMIZERS = {"adamw": "AdamW's moments", "momentum": "momentum", "sgd": "SGD keeps nothing"}


@dataclass(frozen=True)
class _Row:
    """A line of the table; a heading has no values."""

    label: str
    before: float | str | None = None
    after: float | str | None = None
    write: Callable[[float], str] = str

    def cells(self, changed: bool) -> tuple[str, ...]:
        values = [self._cell(self.before)]
        if changed:
            values += [self._cell(self.after), self._change()]
        return (self.label, *values)

    def _cell(self, value: float | str | None) -> str:
        if value is None:
            return ""
        return value if isinstance(value, str) else self.write(value)

    def _change(self) -> str:
        if isinstance(self.before, str) or isinstance(self.after, str) or self.before is None or self.after is None:
            return ""
        if self.before == self.after:
            return "="
        if not self.before or not self.after:
            return "new" if self.after else "gone"
        ratio = self.after / self.before
        return f"×{ratio:.1f}" if ratio >= 10 else f"{ratio - 1:+.1%}".replace("-", "−")


def render(plan: Plan, width: int = 80) -> str:
    """The plan as lines of at most `width` columns (the table takes what it needs, at most 80)."""
    changed = bool(plan.changes)
    lines = list(_table(list(_rows(plan)), changed))
    paragraphs = [] if not changed else [summary(plan)]
    paragraphs += [each.text for each in plan.consequences]
    if plan.proposal:
        paragraphs.append(f"Proposed: {written(plan.proposal)}")
    for paragraph in paragraphs:
        lines += ["", *textwrap.wrap(paragraph, width, break_on_hyphens=False)]
    if plan.corpus is not None:
        corpus = plan.corpus
        said = (
            f"Corpus: {count_text(corpus.tokens)} tokens are {_ratio(corpus.tokens_per_parameter)} for each parameter, "
            f"against the 20 of Chinchilla. Risk of over-fitting when trained from nothing: {corpus.risk}. "
            f"{corpus.reason}"
        )
        lines += ["", *textwrap.wrap(said, width, break_on_hyphens=False)]
    return "\n".join(lines)


def summary(plan: Plan) -> str:
    """What a change does to size, work and capacity, in a sentence or two."""
    size = plan.after.parameters.total / plan.before.parameters.total
    work = plan.after.forward.per_token / plan.before.forward.per_token
    said = f"{_compared(size, 'fewer parameters', 'more parameters', 'As many parameters')}, "
    said += f"{_compared(work, 'less computation', 'more computation', 'as much computation')} for each token."
    if size < 0.995 and work > 0.995:
        return f"{said} The model gets smaller, not faster."
    if size < 0.995:
        return f"{said} A smaller model holds less: expect a higher loss, unless there was too little text to fill it."
    if size > 1.005:
        return f"{said} A larger model holds more, and needs more text to fill it."
    return said


def _compared(ratio: float, less: str, more: str, same: str) -> str:
    if abs(ratio - 1) < 0.005:
        return same
    return f"{abs(ratio - 1):.0%} {less if ratio < 1 else more}"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _table(rows: list[_Row], changed: bool) -> Iterator[str]:
    header: tuple[str, ...] = ("", "before", "after", "change") if changed else ("", "")
    cells = [header, *(row.cells(changed) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for index, line in enumerate(cells):
        if index == 0 and not changed:
            continue
        padded = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        yield " │ ".join(padded).rstrip()
        if index == 0:
            yield "─┼─".join("─" * w for w in widths)


def _rows(plan: Plan) -> Iterator[_Row]:
    before, after = plan.before, plan.after
    for name in plan.changes:
        for path in before.architecture.paths(name):
            old, new = _at(before.architecture, path), _at(after.architecture, path)
            yield _Row(_label(before.architecture, name, path), _shown(old), _shown(new))
    yield from _parameters(before, after)
    yield from _bytes(before, after)
    yield from _work(before, after)
    yield from _memory(plan)
    if plan.timing_before is not None and plan.timing_after is not None:
        yield from _times(plan.timing_before, plan.timing_after)


def _parameters(before: Costs, after: Costs) -> Iterator[_Row]:
    old, new = before.parameters, after.parameters
    yield _Row("Parameters", old.total, new.total, _exact)
    for component, label in _COMPONENTS.items():
        pair = old.by_component[component], new.by_component[component]
        if any(pair):
            yield _Row(f"  {label}", *pair, _exact)
    if old.as_executed > old.total or new.as_executed > new.total:
        yield _Row("  as executed, nothing shared", old.as_executed, new.as_executed, _exact)


def _bytes(before: Costs, after: Costs) -> Iterator[_Row]:
    yield _Row("Checkpoint")
    for dtype in before.checkpoint:
        yield _Row(f"  {dtype}", before.checkpoint[dtype], after.checkpoint[dtype], bytes_text)
    old, new = before.cache, after.cache
    if old.per_token["bfloat16"] or new.per_token["bfloat16"]:
        yield _Row("Key-value cache, bfloat16")
        yield _Row("  a token", old.per_token["bfloat16"], new.per_token["bfloat16"], bytes_text)
    if old.per_source_token["bfloat16"] or new.per_source_token["bfloat16"]:
        pair = old.per_source_token["bfloat16"], new.per_source_token["bfloat16"]
        yield _Row("  a token of the source", *pair, bytes_text)


def _work(before: Costs, after: Costs) -> Iterator[_Row]:
    yield _Row(f"Matrix operations, {before.length:,} tokens")
    yield _Row("  forward, a token", before.forward.per_token, after.forward.per_token, flops_text)
    yield _Row("  prefill, a token", before.prefill.per_token, after.prefill.per_token, flops_text)
    if before.decode is not None and after.decode is not None:
        yield _Row("  decode, a token", before.decode.total, after.decode.total, flops_text)


def _memory(plan: Plan) -> Iterator[_Row]:
    before, after = plan.before, plan.after
    old, new = before.training, after.training
    yield _Row(f"Training, float32, {before.batch:,} × {before.length:,}")
    yield _Row("  weights", old.weights, new.weights, bytes_text)
    yield _Row("  gradients", old.gradients, new.gradients, bytes_text)
    yield _Row(f"  {_OPTIMIZERS[plan.optimizer]}", old.optimizer, new.optimizer, bytes_text)
    yield _Row("  activations", old.activations.total, new.activations.total, bytes_text)
    yield _Row("    checkpointed", old.activations.checkpointed, new.activations.checkpointed, bytes_text)
    yield _Row("  peak", old.total, new.total, bytes_text)
    yield _Row("    checkpointed", old.total_checkpointed, new.total_checkpointed, bytes_text)
    yield _Row(
        f"Inference, float32, {before.batch:,} × {before.length:,}",
        before.inference.total,
        after.inference.total,
        bytes_text,
    )


def _times(before: Timing, after: Timing) -> Iterator[_Row]:
    yield _Row(f"Time at {flops_text(before.flops_per_second)}/s")
    yield _Row("  prefill of a row", before.prefill, after.prefill, seconds_text)
    if before.decode is not None and after.decode is not None:
        yield _Row("  decode, a token", before.decode, after.decode, seconds_text)
    yield _Row("  training step", before.training_step, after.training_step, seconds_text)
    if before.epoch is not None and after.epoch is not None:
        yield _Row("  one epoch", before.epoch, after.epoch, seconds_text)


def _exact(value: float) -> str:
    return f"{value:,.0f}"


def _label(architecture: Architecture, name: str, path: str) -> str:
    """The name as it was given, with the stack in front where it sets several."""
    return name if architecture.paths(name) == [path] else f"{path.partition('.')[0]} {name}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)[:20]


def _at(architecture: Architecture, path: str) -> Any:
    value: Any = architecture
    for key in path.split("."):
        value = getattr(value, key, None)
    return value
