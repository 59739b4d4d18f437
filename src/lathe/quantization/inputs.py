"""What the linear layers of a model read on a text: the second moments of their inputs, X·Xᵀ.

Layers are quantised in the order in which text passes them, and each one's inputs are those that it will have: of the
model whose layers before it are quantised already (GPTQ's own code does so). The streams of all batches are held
before a layer, pass it once while every linear layer in it is listened to, and, when that one is quantised, once more.
Where layers share weights, a matrix is listened to in every layer that uses it, so a stack is passed as a whole.

Shape suffixes: B batch, T positions, D d_model, N tokens, I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lathe.architecture import Stack
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.walk import asked_rows, entered, through, token_rows

Batch = Mapping[str, Tensor]
LEAST_TOKENS = 512


class Moments:
    """The second moments of some layers' inputs."""

    def __init__(self) -> None:
        self.by_layer: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, layer: str, x: Tensor, rows: Tensor) -> None:
        """Count more inputs.

        Args:
            x: what the layer is given, … × I.
            rows: which of them count, flattened.
        """
        if self._last is None or self._last[0] is not x:  # queries, keys and values read the same
            wide_NI = x.detach().flatten(0, -2)[rows.to(x.device)].to("cpu", torch.float32)
            self._last = x, wide_NI.T @ wide_NI
        held, product_II = self.by_layer.get(layer), self._last[1]
        self.by_layer[layer] = product_II.clone() if held is None else held.add_(product_II)


# Given the moments of some layers, quantise them.
Quantise = Callable[[Moments], None]


def pass_text(model: Transformer, batches: Sequence[Batch], layers: Sequence[str], quantise: Quantise) -> None:
    """Let text pass a model, and have its layers quantised on the way.

    Args:
        layers: the linear layers that are listened to.
        quantise: called with the inputs of the next few layers; it may replace them in the model.

    Raises:
        RequestError: too little text.
    """
    tokens = sum(_positions(batch) for batch in batches)
    if tokens < LEAST_TOKENS:
        raise RequestError(
            f"the calibration text has {tokens} tokens: expected {LEAST_TOKENS} or more, some ten thousand to do well"
        )
    training = model.training
    model.eval()
    done: set[str] = set()
    with torch.no_grad():
        for name, stack in model.architecture.stacks:
            units = list(_units(name, stack, layers))
            done.update(layer for _, mine in units for layer in mine)
            _pass_stack(model, name, units, batches, quantise)
        rest = [layer for layer in layers if layer not in done]
        if rest:
            moments = Moments()
            outside = _Outside(model)
            with _heard(model, rest, moments, outside.rows):
                for batch in batches:
                    outside.now(batch)
                    model(**batch)
            quantise(moments)
    model.train(training)


def _pass_stack(
    model: Transformer,
    name: str,
    units: list[tuple[range, list[str]]],
    batches: Sequence[Batch],
    quantise: Quantise,
) -> None:
    held = [entered(model, name, batch) for batch in batches]
    for numbers, layers in units:
        moments = Moments()
        current: list[int] = [0]

        def rows(layer: str, x: Tensor, current: list[int] = current) -> Tensor:
            # Keys and values of cross-attention are read off the encoder.
            reads = "encoder" if ".cross_attention." in layer and layer.endswith((".k", ".v")) else name
            return token_rows(model, reads, x.shape[:-1], batches[current[0]])

        with _heard(model, layers, moments, rows):
            passed = []
            for number, each in enumerate(held):
                current[0] = number
                passed.append(through(model, name, each, numbers))
        if layers:
            quantise(moments)
            passed = [through(model, name, each, numbers) for each in held]
        for each, x_BTD in zip(held, passed):
            each.x_BTD = x_BTD


def _units(name: str, stack: Stack, layers: Sequence[str]) -> Iterator[tuple[range, list[str]]]:
    """Layers that are quantised together, and their linear layers: one, or all where any weights are shared."""
    shared = stack.n_attentions < stack.n_layers or stack.n_feed_forwards < stack.n_layers
    parts = ("attention", "cross_attention", "feed_forward")
    if shared:
        yield range(stack.n_layers), [each for each in layers if each.startswith(tuple(f"{name}.{p}." for p in parts))]
        return
    for number in range(stack.n_layers):
        yield (
            range(number, number + 1),
            [each for each in layers if each.startswith(tuple(f"{name}.{part}.{number}." for part in parts))],
        )


@contextmanager
def _heard(
    model: nn.Module, layers: Iterable[str], moments: Moments, rows: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Count the inputs of some layers."""

    def ear(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            moments.add(layer, given[0], rows(layer, given[0]))

        return listen

    handles = [model.get_submodule(layer).register_forward_pre_hook(ear(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Outside:
    """Which rows count of layers that are in no stack."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._stacks = model, list(dict(model.architecture.stacks))
        self._batch: Batch = {}
        self._times: Counter[str] = Counter()

    def now(self, batch: Batch) -> None:
        """The next batch is about to run."""
        self._batch, self._times = batch, Counter()

    def rows(self, layer: str, x: Tensor) -> Tensor:
        """Of a head's layer those that it is asked about; what lifts the embeddings runs once for each stack."""
        if layer.startswith("head."):
            return asked_rows(self._model, x.shape[:-1], self._batch)
        stack = self._stacks[self._times[layer]]
        self._times[layer] += 1
        return token_rows(self._model, stack, x.shape[:-1], self._batch)


def _positions(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()
