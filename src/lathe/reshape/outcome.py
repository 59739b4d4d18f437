"""What a resize did and what each step cost, as plain values that a page, a model card and a script read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lathe.reshape.measure import Quality


@dataclass(frozen=True)
class Size:
    """A model as it lies on the disk, and how it does."""

    name: str
    parameters: int
    bytes: int
    quality: Quality | None = None  # where there is text to measure on
    tokens_per_second: float | None = None  # reading that text


@dataclass(frozen=True)
class Done:
    """One operation that was carried out, and what it cost.

    Args:
        name: what was done.
        exact: whether it leaves every output as it was, up to rounding.
        detail: what the operation measured of itself, such as the energy kept at each norm.
        measures: what these numbers are, in words.
        change: how much the logits differ from those before it, relative; None where they cannot be compared.
        quality: of the model after it, where there is text.
        heals: whether it is training.
        renumbers: whether the tokenizer is another after it, so that losses a token no longer compare.
        note: what else is worth knowing about it, as a sentence.
    """

    name: str
    exact: bool
    detail: Mapping[str, float]
    change: float | None
    quality: Quality | None
    parameters: int
    measures: str = ""
    heals: bool = False
    renumbers: bool = False
    note: str = ""


@dataclass(frozen=True)
class Reload:
    """The files, opened again.

    Args:
        largest: the largest difference of a logit between the model that was written and the one that was read.
        tokens: how many positions were compared.
        stock: the same against stock `transformers`; None where it is not installed or cannot open the files.
        missing, unexpected: tensors that stock `transformers` names so.
        note: why there is no `stock`.
    """

    largest: float
    tokens: int
    stock: float | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Outcome:
    """Everything about one resize.

    Args:
        family: the file format, such as `t5`; None where only Lathe's own form holds the result.
        reasons: why the family cannot hold it.
        text: where the numbers come from: names and values.
        card: what the source's own model card says of licence, language and data.
        base: the source's hub id; None where it is a directory.
    """

    source: Size
    result: Size
    steps: list[Done]
    reload: Reload
    family: str | None
    reasons: tuple[str, ...]
    text: dict[str, str]
    changes: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # loss of each healing's steps
    card: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    seconds: float = 0.0

    @property
    def is_comparable(self) -> bool:
        """Whether losses a token mean the same before and after: the tokenizer is the same."""
        return not any(step.renumbers for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; an infinite number is None."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def finite(value: Any) -> Any:
    """Plain JSON values: tuples as lists, and None for a number that is infinite or none."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
