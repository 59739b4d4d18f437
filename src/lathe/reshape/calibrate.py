"""What text does to a model: second moments of the residual stream, gathered on calibration batches.

A rotation keeps the directions in which the stream moves most. Each norm sees the stream with its own
size, and what its readers consume is the normed stream, so every token is first divided by its own norm;
otherwise a few large tokens would choose the basis. LayerNorm also removes the mean. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lathe.errors import RequestError
from lathe.model.transformer import Transformer

Batch = Mapping[str, Tensor]


@dataclass
class Moments:
    """Second moments of the unit-normalised input of each norm, and how many tokens were seen."""

    by_norm: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, norm: str, rows_ND: Tensor) -> None:
        """Count more rows."""
        wide = rows_ND.detach().to("cpu", torch.float64)
        product = wide.T @ wide
        self.by_norm[norm] = self.by_norm[norm] + product if norm in self.by_norm else product
        self.tokens[norm] = self.tokens.get(norm, 0) + len(rows_ND)

    def mean(self, norm: str) -> Tensor:
        """E[x̂ x̂ᵀ] at one norm."""
        return self.by_norm[norm] / self.tokens[norm]

    def total(self, norms: Iterable[str]) -> Tensor:
        """The sum of the means over several norms."""
        return torch.stack([self.mean(norm) for norm in norms]).sum(0)


def unit(x: Tensor, *, centred: bool) -> Tensor:
    """Each row divided by its root mean square, after its mean is removed where `centred`."""
    x = x.double()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def moments(model: Transformer, batches: Iterable[Batch], norms: Iterable[str]) -> Moments:
    """Run the batches through the model and gather the moments at each of `norms`.

    Args:
        batches: keyword arguments of the model, one mapping each.

    Raises:
        RequestError: no tokens.
    """
    gathered = Moments()

    def listener(norm: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        centred = isinstance(model.get_submodule(norm), nn.LayerNorm)

        def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            gathered.add(norm, unit(inputs[0], centred=centred).flatten(0, -2)[token_rows(inputs[0], norm, current)])

        return listen

    current: Batch = {}
    with listening(model, {norm: listener(norm) for norm in norms}), torch.no_grad():
        for batch in batches:
            current = batch
            model(**batch)
    if not gathered.tokens:
        raise RequestError("the calibration text is empty; give calibrate=FILE, text such as the model is used on")
    return gathered


def token_rows(x: Tensor, norm: str, batch: Batch) -> Tensor:
    """Which rows of a norm's input are tokens, flattened; pads would count as text otherwise."""
    side = "decoder_" if norm.startswith("decoder") and "decoder_input_ids" in batch else ""
    counted = torch.ones(x.shape[:-1], dtype=torch.bool)
    mask, segments = batch.get(f"{side}attention_mask"), batch.get(f"{side}segment_ids")
    if mask is not None and mask.shape == counted.shape:
        counted &= mask.cpu().bool()
    if segments is not None and segments.shape == counted.shape:
        counted &= segments.cpu() >= 0  # packed rows number their pads −1
    return counted.flatten()


@contextmanager
def listening(
    model: nn.Module, listeners: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], None]]
) -> Iterator[None]:
    """Call each listener with the input of the module it is named for; the model evaluates meanwhile."""
    training = model.training
    model.eval()
    handles: list[Any] = [
        model.get_submodule(name).register_forward_pre_hook(listener) for name, listener in listeners.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
