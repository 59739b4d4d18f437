"""What text does to a model: second moments of the residual stream, gathered on calibration batches.

A rotation keeps the directions in which the stream moves most. Each norm sees the stream with its own
size, and what its readers consume is the normed stream, so every token is first divided by its own norm;
otherwise a few large tokens would choose the basis. LayerNorm also removes the mean. Sums are float64.

Where a norm's output is itself the stream (post-norm, a norm on the embeddings), its weight and bias have already
been at work on it, and it is the output that is taken, as it is but for the mean.
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
from lathe.reshape.spill import Tensors
from lathe.reshape.stream import blank, run_text
from lathe.reshape.walk import token_rows

Batch = Mapping[str, Tensor]

NO_TEXT = (
    "this cut is fitted on text, and there is none: give --calibrate FILE, or calibrate= from Python, with text such "
    "as the model is used on"
)


def there(batches: Iterable[Batch], device: torch.device) -> list[Batch]:
    """Batches where a model is, which is where it reads them."""
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


@dataclass
class Moments:
    """Second moments of the unit-normalised input of each norm, and how many tokens were seen.

    `loud` holds each norm's output, squared and summed over tokens, channel by channel.
    """

    by_norm: Tensors = field(default_factory=Tensors)
    tokens: dict[str, int] = field(default_factory=dict)
    loud: dict[str, Tensor] = field(default_factory=dict)

    def add(self, norm: str, rows_ND: Tensor) -> None:
        """Count more rows."""
        wide = rows_ND.detach().to("cpu", torch.float64)
        product = wide.T @ wide
        self.by_norm[norm] = self.by_norm[norm] + product if norm in self.by_norm else product
        self.tokens[norm] = self.tokens.get(norm, 0) + len(rows_ND)

    def mean(self, norm: str) -> Tensor:
        """E[x̂ x̂ᵀ] at one norm."""
        return self.by_norm[norm] / self.tokens[norm]

    def total(self, norms: Iterable[str], weights: Mapping[str, float] | None = None) -> Tensor:
        """The sum of the means over several norms.

        Args:
            weights: what each counts; alike where left out.
        """
        total = torch.zeros((), dtype=torch.float64)
        for norm in norms:  # one after the other: all of them together may be larger than the model
            total = total + (self.mean(norm) if weights is None else weights[norm] * self.mean(norm))
        return total

    def loudness(self, norms: Iterable[str]) -> Tensor:
        """How much each channel carries of what the norms hand on: shares of the squares, summed over the norms.

        Shares, because readers undo whatever size a norm gives its output.
        """
        seen = [self.loud[norm] for norm in norms if norm in self.loud]
        return torch.stack([each / each.sum().clamp_min(1e-300) for each in seen]).sum(0)


def unit(x: Tensor, *, centred: bool) -> Tensor:
    """Each row divided by its root mean square, after its mean is removed where `centred`."""
    x = x.double()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def moments(
    model: Transformer, batches: Iterable[Batch], norms: Iterable[str], *, streams: Iterable[str] = ()
) -> Moments:
    """Run the batches through the model and gather the moments at each of `norms`.

    Args:
        batches: keyword arguments of the model, one mapping each.
        norms: norms, or linear layers that read an axis without one, whose inputs are taken as they are.
        streams: those of the norms whose output is the stream.

    Raises:
        RequestError: one of them is passed by no token.
    """
    gathered, norms, outputs = Moments(blank(model)), tuple(norms), frozenset(streams)

    def ear(norm: str) -> Ear:
        centred = isinstance(model.get_submodule(norm), nn.LayerNorm)

        def listen(given: Tensor, out: Tensor) -> None:
            # What lifts the embeddings is in no stack: it runs for one after the other.
            place = stack if norm.startswith("embedding.") else norm
            rows = token_rows(model, place, given.shape[:-1], current)
            if isinstance(model.get_submodule(norm), nn.Linear):  # no norm divides what it reads
                read_ND = given.detach().flatten(0, -2)[rows].to("cpu", torch.float64)
                gathered.add(norm, read_ND)
                gathered.loud[norm] = gathered.loud.get(norm, torch.zeros(())) + read_ND.square().sum(0)
                return
            made_ND = out.detach().flatten(0, -2)[rows].to("cpu", torch.float64)
            seen = made_ND - made_ND.mean(-1, keepdim=True) if centred else made_ND
            gathered.add(norm, seen if norm in outputs else unit(given, centred=centred).flatten(0, -2)[rows])
            gathered.loud[norm] = gathered.loud.get(norm, torch.zeros(())) + made_ND.square().sum(0)

        return listen

    current: Batch = {}
    stack = ""

    def hear(batch: Batch, running: str) -> None:
        nonlocal current, stack
        current, stack = batch, running

    training = model.training
    model.eval()
    with heard(model, {norm: ear(norm) for norm in norms}), torch.no_grad():
        run_text(model, batches, hear)
    model.train(training)
    if not gathered.tokens:
        raise RequestError(NO_TEXT)
    if (deaf := next((norm for norm in norms if not gathered.tokens.get(norm)), None)) is not None:
        raise RequestError(
            f"the calibration text has no token that passes {deaf}: are all labels ignored, or all positions masked? "
            "give text that both sides read"
        )
    return gathered


# What passes a module: its first input and its output.
Ear = Callable[[Tensor, Tensor], None]


@contextmanager
def heard(model: nn.Module, ears: Mapping[str, Ear]) -> Iterator[None]:
    """Call each ear with the first input and the output of the module it is named for, whenever that runs."""

    def hook(ear: Ear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, given, out: ear(given[0], out)

    handles = [model.get_submodule(name).register_forward_hook(hook(ear)) for name, ear in ears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
