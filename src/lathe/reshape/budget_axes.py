"""What a budget may be spent on: the axes of a model, and the sizes of each that can be had.

An axis is one field of the architecture, or the same field of every stack where the family's files hold only one
number for all of them (T5's `d_ff`). A size is offered where `resize` can make it, where the family's files can hold
it together with what it drags along, and where it saves something: fewer heads that grow wider to fill the width save
nothing. Sizes are multiples that suit the hardware (64 for what is large, then 16, 8 and 1), at most 64 of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lathe.architecture import Architecture
from lathe.blueprint import count
from lathe.errors import RequestError
from lathe.families import objections
from lathe.planner.flops import forward
from lathe.reshape.resize import planned

# What an axis is called, and the short name of its field. Sharing is not among them: it saves no computation.
KINDS: dict[str, str] = {
    "vocabulary": "vocab_size",
    "feed-forward": "d_ff",
    "depth": "n_layers",
    "query heads": "n_heads",
    "key-value heads": "n_kv_heads",
    "embedding rank": "d_embed",
    "width": "d_model",
}
GIVEN = "its size was given"
_MOST_SIZES = 64
_TEXT = 128  # tokens, where computation is counted
_STEPS = ((2048, 64), (256, 16), (64, 8))  # from which size on, multiples of what
_WHOLE = ("n_layers", "n_heads", "n_kv_heads")


@dataclass(frozen=True)
class Axis:
    """One thing that can be cut.

    Args:
        label: what it is called.
        field: as `Architecture.with_` takes it.
        old: the size that there is; of an embedding without a rank of its own, the width.
        sizes: those that can be had, the largest first, all below `old`.
    """

    label: str
    field: str
    old: int
    sizes: tuple[int, ...]

    def removed(self, size: int) -> float:
        """The share of the axis that goes with a cut to `size`."""
        return 1.0 - size / self.old


@dataclass(frozen=True)
class Terms:
    """Under which conditions a size can be had.

    Args:
        how: the method and what else `planned` takes by name.
        fixed: fields that are set in any case.
        least_vocabulary: the tokens that must stay; None where the vocabulary cannot be cut.
        timed: whether time is what there is too little of: then a size saves by what is not computed any more, as depth
            does where layers share their weights, and not by what is not stored.
    """

    how: tuple[tuple[str, Any], ...] = ()
    own_form: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()
    least_vocabulary: int | None = None
    timed: bool = False

    def architecture(self, source: Architecture, sizes: Mapping[str, int]) -> Architecture | None:
        """What the sizes lead to; None where they cannot be had together."""
        changes = {**dict(self.fixed), **sizes}
        try:
            target, _ = planned(source, changes, **dict(self.how), own_form=self.own_form)
        except RequestError:
            return None
        return target if self.own_form or not objections(target) or objections(source) else None

    def weight(self, architecture: Architecture) -> int:
        """What is to become less: matrix operations of a text, or parameters."""
        return forward(architecture, _TEXT).total if self.timed else count(architecture)


def offered(source: Architecture, terms: Terms) -> tuple[list[Axis], dict[str, str]]:
    """The axes that can be cut, and why the others cannot, by their labels."""
    taken = {path for name, _ in terms.fixed for path in source.paths(name)}
    axes: list[Axis] = []
    without: dict[str, str] = {}
    for label, name in KINDS.items():
        paths = [path for path in source.paths(name) if path not in taken]
        if not paths:
            without[label] = GIVEN
        elif name == "vocab_size" and terms.least_vocabulary is None:
            without[label] = "needs a tokenizer and text to see which tokens count"
        else:
            found = [axis for path in paths if (axis := _axis(source, terms, _labelled(label, path, paths), path))]
            if not found and len(paths) > 1:
                axis = _axis(source, terms, label, name)
                found = [axis] if axis else []
            axes += found
            if not found:
                without[label] = "no smaller size that can be had saves anything"
    return axes, without


def smallest(source: Architecture, axes: Iterable[Axis], terms: Terms) -> dict[str, int]:
    """The smallest sizes that can be had together, chosen axis by axis."""
    sizes: dict[str, int] = {}
    for axis in axes:
        for size in reversed(axis.sizes):
            if terms.architecture(source, {**sizes, axis.field: size}) is not None:
                sizes[axis.field] = size
                break
    return sizes


def _labelled(label: str, path: str, paths: list[str]) -> str:
    return label if len(paths) == 1 else f"{path.split('.')[0]} {label}"


def _axis(source: Architecture, terms: Terms, label: str, field: str) -> Axis | None:
    olds = {_size(source, path) for path in source.paths(field)}
    if len(olds) > 1:
        return None
    old = olds.pop()
    least = (terms.least_vocabulary or 1) if field.endswith("vocab_size") else 1
    base = terms.architecture(source, {}) or source
    before = terms.weight(base)
    for step in dict.fromkeys((_step(field, old), 1)):
        sizes = []
        for size in _ladder(old, step, least):
            made = terms.architecture(source, {field: size})
            if made is not None and terms.weight(made) < before:
                sizes.append(size)
        if sizes:
            return Axis(label, field, old, tuple(sizes))
    return None


def _size(source: Architecture, path: str) -> int:
    value: Any = source
    for key in path.split("."):
        value = getattr(value, key)
    if value is not None:
        return int(value)
    # Nothing said: an embedding is as wide as the model, and there are as many key-value heads as query heads.
    stack = getattr(source, path.split(".")[0])
    return source.d_model if path.startswith("embedding") else int(stack.attention.kv_heads)


def _step(field: str, old: int) -> int:
    if field.rpartition(".")[2] in _WHOLE:
        return 1
    return next((step for size, step in _STEPS if old >= size), 1)


def _ladder(old: int, step: int, least: int) -> list[int]:
    """The multiples of a step below `old`, or of a larger one where they would be too many; the largest first."""
    wide = step * -(-old // (step * _MOST_SIZES))
    return [size for size in range(-(-old // wide) * wide - wide, 0, -wide) if max(least, 1) <= size < old]
