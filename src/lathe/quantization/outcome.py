"""What a quantisation did and what it cost, as plain values that a page, a model card and a script read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lathe.reshape.measure import Quality
from lathe.reshape.outcome import Reload, Size


@dataclass(frozen=True)
class Layer:
    """One quantised matrix.

    Args:
        error: how far its output is off on the text, relative; of the weights themselves where no text was seen.
        bytes_before, bytes_after: of the matrix.
    """

    name: str
    bits: int
    group_size: int
    activations: str
    error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Proposal:
    """A layer that would be worth leaving alone.

    Args:
        gain: by how much the loss is lower with it alone left as it was, in nats.
        bytes: that this costs.
    """

    name: str
    gain: float
    bytes: int


@dataclass
class Outcome:
    """Everything about one quantisation.

    Args:
        layers: every quantised matrix, the worst first.
        kept: the layers that were left alone though they could have been quantised.
        change: how much the logits differ from the source's, relative.
        proposals: layers to keep, by what each is worth; empty where nothing was measured, or none is.
        family: the file format; None where only Lathe's own form holds the result.
        reasons: why stock files cannot.
        facts: where the numbers come from: names and values.
        card: what of the source's model card is true of the result.
        data: the settings of the text that it was measured on, where it was another than the codes were chosen on.
    """

    source: Size
    result: Size
    settings: Mapping[str, Any]
    layers: list[Layer]
    kept: list[str]
    change: float | None
    proposals: list[Proposal]
    reload: Reload
    family: str | None
    reasons: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    seconds: float = 0.0
    data: Mapping[str, Any] | None = None

    @property
    def loss_change(self) -> float | None:
        """By which share the loss rose; None where it was not measured."""
        before, after = self.source.quality, self.result.quality
        return None if before is None or after is None else loss_change(before, after)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "loss_change": self.loss_change}


def loss_change(before: Quality, after: Quality) -> float:
    """By which share a loss rose."""
    return after.loss / before.loss - 1.0
