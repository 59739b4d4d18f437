"""What else follows from a change of sizes, and the adjustment that would answer it.

A size seldom changes alone. A narrower stream leaves the heads and the feed-forward as wide as they were, so
the proportions drift; a file format may want the heads to fill the width exactly; sharing saves parameters
and no time. Each rule here looks at the architecture before and after and says one such thing in a sentence,
with the fields that would put it right where there are any. Nothing is changed without being asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lathe.architecture import Architecture, Stack
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.families import objections
from lathe.planner.costs import Costs
from lathe.planner.quantities import bytes_text, count_text, written
from lathe.spec import Spec

# The narrowest and widest d_model / n_layers among the presets (tests hold this against them).
SLIMMEST, STOUTEST = 21.0, 342.0
# A proportion that moves by less is called kept.
DRIFT = 0.05
# Matrix kernels of CPUs and accelerators work on blocks of channels of at least this many.
BLOCK = 8


@dataclass(frozen=True)
class Consequence:
    """One thing that follows from a change.

    Attributes:
        about: one word: format, heads, feed_forward, head, embedding, sharing, proportions, blocks, cache,
            training, memory.
        text: what follows, in plain sentences.
        changes: fields for `Architecture.with_` that would answer it; empty where nothing needs to change.
    """

    about: str
    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """What the rules look at: both sides, and the fields that were set by hand."""

    before: Costs
    after: Costs
    given: frozenset[str]

    @property
    def old(self) -> Architecture:
        return self.before.architecture

    @property
    def new(self) -> Architecture:
        return self.after.architecture

    def stacks(self) -> Iterator[tuple[str, Stack, Stack]]:
        """The stacks that both sides have: name, before, after."""
        old = dict(self.old.stacks)
        yield from ((name, old[name], stack) for name, stack in self.new.stacks if name in old)

    def set_by_hand(self, path: str) -> bool:
        """Whether the field was set, or one that it is in."""
        return any(path == given or path.startswith(f"{given}.") for given in self.given)


def consequences(before: Costs, after: Costs, given: Mapping[str, Any]) -> list[Consequence]:
    """Everything that follows from turning `before` into `after` by setting the fields of `given`.

    Without a change, what there is to say about the architecture as it is.
    """
    paths = frozenset(path for name in given for path in before.architecture.paths(name))
    change = _Change(before, after, paths)
    found = [each for rule in _RULES for each in rule(change)]
    return [*_format(change, proposal(found)), *found]


def proposal(found: Iterable[Consequence]) -> dict[str, Any]:
    """The fields that answer all of `found` together."""
    changes: dict[str, Any] = {}
    # What a file format wants is worked out over the other adjustments, and has the last word.
    for each in sorted(found, key=lambda each: each.about == "format"):
        changes |= each.changes
    return changes


def _format(change: _Change, adjusted: Mapping[str, Any]) -> Iterator[Consequence]:
    """What the family's file format cannot hold, and whether the other adjustments already answer it."""
    reasons = "; ".join(each.reason for each in objections(change.new))
    if not reasons:
        return
    text = f"A stock {change.new.family} checkpoint cannot hold this: {reasons}."
    left = objections(change.new.with_(adjusted))
    fixes: dict[str, Any] = {}
    for each in left:
        wanted = _leaves(change.new, each.changes)
        undone = any(
            change.set_by_hand(path) and _at(change.new, path) != value
            for name, value in (wanted or {}).items()
            for path in change.new.paths(name)
        )
        if undone or not wanted:
            yield Consequence("format", f"{text} It saves in Lathe's own form (lathe.json).")
            return
        fixes |= wanted
    if not left:
        yield Consequence("format", f"{text} The adjustments below make it fit.")
    elif not _can_be(change.new, {**adjusted, **fixes}):
        yield Consequence("format", f"{text} It saves in Lathe's own form (lathe.json).")
    else:
        fixes = change.new.short(fixes)
        yield Consequence("format", f"{text} With {written(fixes)} it can.", fixes)


def _heads(change: _Change) -> Iterator[Consequence]:
    """Queries, keys and values beside the stream."""
    if change.old.d_model == change.new.d_model:
        return
    wanted: dict[str, Any] = {}
    said = ""
    for name, old, new in change.stacks():
        ratio, now = old.attention.d_q / change.old.d_model, new.attention.d_q / change.new.d_model
        paths = [f"{name}.attention.{each}" for each in ("n_heads", "d_head")]
        if _same(ratio, now) or any(change.set_by_hand(path) for path in paths):
            continue
        a = new.attention
        # As large groups as there are; or, where it was said how many there are, as many.
        are_given = change.set_by_hand(f"{name}.attention.n_kv_heads")
        group = a.kv_heads if are_given else a.n_heads // a.kv_heads
        n_heads = max(1, round(ratio * change.new.d_model / (a.d_head * group))) * group
        wanted[f"{name}.attention.n_heads"] = n_heads
        if a.n_kv_heads is not None and not are_given:
            wanted[f"{name}.attention.n_kv_heads"] = n_heads // group
        said = (
            f"Queries are {a.d_q:,} wide ({a.n_heads} heads of {a.d_head}), {now:.1f} times the stream of "
            f"{change.new.d_model:,}; {ratio:.1f} times before."
        )
    for objection in objections(change.new.with_(wanted)):
        # A format that wants other heads than these: n_heads · d_head = d_model where d_head does not divide it.
        fixed = {path: value for name, value in objection.changes.items() for path in change.new.paths(name)}
        if wanted.keys() & fixed.keys() and _can_be(change.new, {**wanted, **fixed}):
            wanted |= fixed
    wanted = {path: value for path, value in wanted.items() if _at(change.new, path) != value}
    if wanted:
        changes = change.new.short(wanted)
        yield Consequence("heads", f"{said} {written(changes)} keeps the proportion.", changes)


def _feed_forward(change: _Change) -> Iterator[Consequence]:
    """The feed-forward beside the stream."""
    wanted: dict[str, Any] = {}
    said = ""
    for name, old, new in change.stacks():
        ratio, now = old.feed_forward.d_ff / change.old.d_model, new.feed_forward.d_ff / change.new.d_model
        if _same(ratio, now):
            continue
        path = f"{name}.feed_forward.d_ff"
        said = (
            f"The feed-forward is {new.feed_forward.d_ff:,} wide, {now:.1f} times the stream; {ratio:.1f} times before."
        )
        if not change.set_by_hand(path):
            wanted[path] = _rounded(ratio * change.new.d_model)
    wanted = {path: value for path, value in wanted.items() if _at(change.new, path) != value}
    if wanted:
        changes = change.new.short(wanted)
        yield Consequence("feed_forward", f"{said} {written(changes)} keeps the proportion.", changes)
    elif said:
        yield Consequence("feed_forward", said)


def _head(change: _Change) -> Iterator[Consequence]:
    """The table that turns hidden states into tokens."""
    old, new = change.old.head.language, change.new.head.language
    if old is None or new is None:
        return
    table = change.new.embedding.vocab_size * change.new.width
    if old.tied and not new.tied:
        yield Consequence(
            "head", f"The head is no longer tied to the token table: {count_text(table)} parameters more."
        )
    elif new.tied and not old.tied:
        yield Consequence(
            "head",
            f"The head is tied to the token table: {count_text(table)} parameters fewer. A trained head is lost.",
        )
    elif new.tied and change.new.d_model < change.old.d_model and _is_pre_norm(change.new):
        yield Consequence(
            "head",
            "The head is tied to the token table. Cutting the width of a trained model folds the last norm's scale "
            f"into the head, which a tied one takes only roughly; tied=false takes it exactly and adds "
            f"{count_text(table)} parameters.",
        )


def _embedding(change: _Change) -> Iterator[Consequence]:
    """The factorised token table (ALBERT §3.1), and a table that is most of the model."""
    a = change.new
    vocab, d = a.embedding.vocab_size, a.d_model
    if a.embedding.d_embed is not None:
        limit = vocab * d // (vocab + d)
        factorised = (vocab + d) * a.embedding.d_embed
        if a.embedding.d_embed > limit:
            yield Consequence(
                "embedding",
                f"d_embed={a.embedding.d_embed} saves nothing: the table and the matrix that lifts it hold "
                f"{count_text(factorised)}, one table of d_model {count_text(vocab * d)}. "
                f"Below {limit + 1:,} it saves.",
            )
        elif change.old.embedding.d_embed is None:
            yield Consequence(
                "embedding",
                f"The factorised token table holds {count_text(factorised)} parameters in place of "
                f"{count_text(vocab * d)}.",
            )
    tables = sum(p.size for p in stored(a) if any(axis.name == "vocab" for axis in p.axes))
    share = tables / change.after.parameters.total
    if share > 0.5:
        yield Consequence(
            "embedding",
            f"{share:.0%} of the parameters are token tables, which cost bytes and, apart from the head, no time. "
            "A smaller vocab_size or a d_embed saves more of them than anything else would.",
        )


def _sharing(change: _Change) -> Iterator[Consequence]:
    """Sharing saves parameters, not computation (ALBERT §3.1)."""
    own = change.after.parameters
    if own.total < own.as_executed:
        yield Consequence(
            "sharing",
            f"Layers share their weights: {count_text(own.total)} parameters do the work of "
            f"{count_text(own.as_executed)}. That saves checkpoint bytes and memory, not computation: the model is "
            "as fast as an unshared one of its shape, and no faster.",
        )
    elif change.before.parameters.total < change.before.parameters.as_executed:
        yield Consequence("sharing", "Layers no longer share their weights: more parameters, the same computation.")


def _proportions(change: _Change) -> Iterator[Consequence]:
    """Depth beside width."""
    for name, old, new in change.stacks():
        before, now = change.old.d_model / old.n_layers, change.new.d_model / new.n_layers
        if _same(before, now) or SLIMMEST < now < STOUTEST:
            continue
        n_layers = max(1, round(change.new.d_model / before))
        shape = "deep and narrow" if now <= SLIMMEST else "shallow and wide"
        yield Consequence(
            "proportions",
            f"The {name} is {shape}: {new.n_layers} layers of {change.new.d_model:,} channels are {now:.3g} a layer, "
            f"where the presets have {SLIMMEST:.0f} to {STOUTEST:.0f}. n_layers={n_layers} would keep the "
            f"{before:.3g} from before.",
        )
        return


def _blocks(change: _Change) -> Iterator[Consequence]:
    """Widths that fill no whole block of a kernel."""
    fields = {"d_model": ["d_model"], "vocab_size": ["embedding.vocab_size"], "d_embed": ["embedding.d_embed"]}
    for short, rest in (("d_ff", "feed_forward.d_ff"), ("d_head", "attention.d_head")):
        fields[short] = [f"{name}.{rest}" for name, _ in change.new.stacks]
    for short, paths in fields.items():
        for path in paths:
            value = _at(change.new, path)
            if value is None or value % BLOCK == 0 or not change.set_by_hand(path):
                continue
            yield Consequence(
                "blocks",
                f"{short}={value} is no multiple of {BLOCK}. Matrix kernels work on blocks of channels, so "
                f"{short}={-(-value // BLOCK) * BLOCK} costs about as much time.",
            )
            break


def _cache(change: _Change) -> Iterator[Consequence]:
    """Grouped heads and what they save."""
    old, new = change.before.cache.per_token["bfloat16"], change.after.cache.per_token["bfloat16"]
    for _, was, now in change.stacks():
        before, after = (a.n_heads // a.kv_heads for a in (was.attention, now.attention))
        if before == after or not (old and new):
            continue
        text = (
            f"Each key-value head serves {after} query head{'s' if after > 1 else ''}, {before} before; the cache "
            f"takes {bytes_text(new)} a token in bfloat16 instead of {bytes_text(old)}."
        )
        merged = " Training or healing has to make up for heads that are merged." if after > before else ""
        yield Consequence("cache", text + merged)
        return


# Fields whose change is one of kind: the weights then stand for another computation.
_KINDS = (
    "feed_forward.activation",
    "feed_forward.gated",
    "norm.kind",
    "norm_position",
    "positions.kind",
    "attention.scaled",
)


def _training(change: _Change) -> Iterator[Consequence]:
    """Changes that no trained weights survive."""
    kinds = {
        path.rpartition(".")[2] if path != "positions.kind" else "positions"
        for name, _, _ in change.stacks()
        for path in _KINDS
        if _at(change.old, f"{name}.{path}") != _at(change.new, f"{name}.{path}")
    }
    if kinds:
        named = " and ".join(sorted(kinds))
        yield Consequence(
            "training",
            f"Another {named} is another computation, not another size: weights trained before will not do, so the "
            "model has to be trained anew.",
        )


def _memory(change: _Change) -> Iterator[Consequence]:
    """Attention weights that the CPU has to keep."""
    kept = change.after.training.activations
    if kept.attention_weights > 0.25 * kept.total:
        yield Consequence(
            "memory",
            f"{bytes_text(kept.attention_weights)} of the {bytes_text(kept.total)} of activations are attention "
            "weights, which grow with the square of the length. PyTorch keeps them on a CPU because attention "
            "drops some out or adds a trained bias; fused kernels of accelerators keep none.",
        )


_RULES: tuple[Callable[[_Change], Iterator[Consequence]], ...] = (
    _heads,
    _feed_forward,
    _head,
    _embedding,
    _sharing,
    _cache,
    _proportions,
    _blocks,
    _training,
    _memory,
)


def _can_be(architecture: Architecture, changes: Mapping[str, Any]) -> bool:
    """Whether the sizes are legal together: a format may want an odd d_head, which rotary positions cannot have."""
    try:
        architecture.with_(changes)
    except RequestError:
        return False
    return True


def _same(before: float, after: float) -> bool:
    return abs(after / before - 1) <= DRIFT


def _rounded(width: float) -> int:
    """A feed-forward's width as a multiple of 64, or of 8 where 64 would be coarse."""
    step = 64 if width >= 512 else BLOCK
    return max(step, round(width / step) * step)


def _is_pre_norm(architecture: Architecture) -> bool:
    return list(architecture.stacks)[-1][1].norm_position == "pre"


def _at(architecture: Architecture, path: str) -> Any:
    value: Any = architecture
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _leaves(architecture: Architecture, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same changes with no more than one value each, so that they can be typed; None where a record is new."""
    leaves: dict[str, Any] = {}
    for path, value in changes.items():
        if not isinstance(value, Mapping):
            leaves[path] = value
            continue
        if not isinstance(_at(architecture, path), Spec):
            return None
        parts = {f"{path}.{name}": part for name, part in value.items()}
        found = _leaves(architecture, {each: part for each, part in parts.items() if _at(architecture, each) != part})
        if found is None:
            return None
        leaves |= found
    return leaves
