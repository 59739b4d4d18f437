"""A parent and its narrow child, walked through the text side by side, layer by layer.

A fit of one layer needs what the layer reads once everything before it is fitted. Running whole models for every fit
would cost the square of their depth, and keeping every activation would cost the memory. So each batch is held as the
stream before one layer, in both models; a layer is run as often as it has parts to fit, and then the streams move on
to the next. What is held is one vector a token and model, on the disk where the models are streamed. Everything wider
is looked at by listeners as it passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lathe.model.block import Surroundings
from lathe.model.loss import IGNORED
from lathe.model.mask import drop_if_full
from lathe.model.stack import Memory, TransformerStack
from lathe.model.transformer import Transformer
from lathe.reshape.spill import Tensors, parked

if TYPE_CHECKING:
    from lathe.reshape.calibrate import Batch

_HELD_EVERY = 8
ONE_ROW = "one row of text cannot be split, to fit on and to choose by: give more text"


@dataclass
class Held:
    """One batch in one model: the stream before a layer, and what every layer is given."""

    x_BTD: Tensor
    around: Surroundings


class Streams:
    """Batches of one model, held before the same layer.

    Args:
        place: where their tensors are kept: in memory or on the disk.
    """

    def __init__(self, place: Tensors) -> None:
        self._place = place
        self._around: list[Callable[[], Any]] = []
        self._shapes: list[torch.Size] = []

    def add(self, held: Held) -> None:
        """One more batch."""
        number = len(self._around)
        self._around.append(parked(held.around, self._place, f"{number}.around"))
        self._shapes.append(held.x_BTD.shape)
        self.move(number, held.x_BTD)

    def move(self, number: int, x_BTD: Tensor) -> None:
        """A batch' stream as it is by now."""
        self._place[f"{number}.x"] = x_BTD

    def shape(self, number: int) -> torch.Size:
        """Rows and positions of a batch."""
        return self._shapes[number][:2]

    def __getitem__(self, number: int) -> Held:
        return Held(self._place[f"{number}.x"], self._around[number]())

    def __len__(self) -> int:
        return len(self._around)


class _Reached(Exception):
    """The call that was waited for has been made."""


def _run_until(handle: RemovableHandle, model: Transformer, batch: Batch) -> None:
    """Run a batch until a hook has what it waited for, and remove the hook."""
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()


def stack_of(model: Transformer, name: str) -> TransformerStack:
    """A model's encoder or decoder."""
    stack = model.get_submodule(name)
    assert isinstance(stack, TransformerStack)
    return stack


def entered(model: Transformer, name: str, batch: Batch, memory_BSD: Tensor | None = None) -> Held:
    """A batch as it enters a stack.

    Args:
        memory_BSD: what the encoder before the stack left; it runs where this is left out.
    """
    stack, calls = stack_of(model, name), []
    if memory_BSD is not None:
        padding_BS = drop_if_full(batch.get("attention_mask"))
        batch = {**batch, "encoder_outputs": Memory(memory_BSD, padding_BS, batch.get("segment_ids"))}  # type: ignore[dict-item]

    def caught(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((given, named))
        raise _Reached

    handle = stack.register_forward_pre_hook(caught, with_kwargs=True)
    _run_until(handle, model, batch)
    given, named = calls[0]
    return Held(*stack.enter(*given, **{key: value for key, value in named.items() if key != "trace"}))


def left(model: Transformer, batch: Batch) -> Tensor:
    """What the last stack leaves of a batch; the heads do not run."""
    ends: list[Tensor] = []

    def caught(_: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        ends.append(out)
        raise _Reached

    handle = stack_of(model, list(model.architecture.stacks)[-1][0]).register_forward_hook(caught)
    _run_until(handle, model, batch)
    return ends[0]


def through(model: Transformer, name: str, held: Held, layers: range) -> Tensor:
    """The stream of a batch after some layers of a stack."""
    x_BTD, stack = held.x_BTD, stack_of(model, name)
    for number in layers:
        x_BTD, _, _ = stack.layer(number)(x_BTD, held.around)
    return x_BTD


@contextmanager
def standing(model: Transformer, left_BTD: Tensor) -> Iterator[None]:
    """Within it the stacks count as run: a call of the model runs its heads alone, on what the last stack left."""
    stacks = [stack_of(model, name) for name, _ in model.architecture.stacks]
    for stack in stacks:
        stack.__dict__["forward"] = lambda *_, **__: left_BTD
    try:
        yield
    finally:
        for stack in stacks:
            del stack.__dict__["forward"]


def read_by(model: Transformer, module: str, batch: Batch, left_BTD: Tensor) -> Tensor:
    """What a module of the head reads of a batch; no token's logits are computed on the way.

    Args:
        left_BTD: what the last stack left of the batch.
    """
    reads: list[Tensor] = []

    def caught(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        reads.append(given[0])
        raise _Reached

    def nothing(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0][:, :0], *given[1:])

    handles = [model.get_submodule(module).register_forward_pre_hook(caught)]
    language = model.head.language
    if language is not None and not module.startswith("head.language."):
        handles.append(language.register_forward_pre_hook(nothing))
    try:
        with standing(model, left_BTD):
            model(**batch)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return reads[0]


def shape_of(model: Transformer, name: str, batch: Batch) -> torch.Size:
    """Rows and positions of a batch in a stack, before any of it is run."""
    keys = ["input_ids", "inputs_embeds"]
    if model.encoder is not None and model.decoder is not None and name == "decoder":
        # As the model itself makes a decoder's input: from the labels, or for a pooler from the encoder's.
        has_language = model.head.language is not None
        keys = ["decoder_input_ids", *(["labels"] if has_language else []), "input_ids"]
    found = next(batch[key] for key in keys if key in batch)
    return found.shape[:2]


def token_rows(model: Transformer, name: str, shape: torch.Size, batch: Batch) -> Tensor:
    """Which rows of a stack's stream are tokens, flattened; pads would count as text otherwise.

    Args:
        name: the stack, or a module in it.
        shape: rows × positions of the stream.
    """
    of_two = name.partition(".")[0] == "decoder" and model.encoder is not None
    side = "decoder_" if of_two else ""
    mask, segments = batch.get(f"{side}attention_mask"), batch.get(f"{side}segment_ids")
    counted = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        counted &= mask.cpu().bool()
    if segments is not None:
        counted &= segments.cpu() >= 0  # packed rows number their pads −1
    if of_two and mask is None and segments is None:
        counted &= _unmarked_tokens(model, shape, batch)
    return counted.flatten()


def _unmarked_tokens(model: Transformer, shape: torch.Size, batch: Batch) -> Tensor:
    """Which of a decoder's positions are tokens, where no mask of its own says so: what its input is made of does."""
    if "labels" in batch and model.head.language is not None:
        return batch["labels"].cpu() != IGNORED
    if "decoder_input_ids" in batch or "attention_mask" not in batch:
        return torch.ones(shape, dtype=torch.bool)
    read = batch["attention_mask"].cpu().bool()  # the encoder's input, moved on by the start token
    return torch.cat((torch.ones_like(read[:, :1]), read[:, :-1]), 1)


def asked_rows(model: Transformer, shape: torch.Size, batch: Batch) -> Tensor:
    """Which rows of the last stream the head is asked about: those with a label, or every token's."""
    name = "encoder" if model.decoder is None else "decoder"
    counted = token_rows(model, name, shape, batch)
    labels = batch.get("labels")
    if labels is None or labels.shape != shape or model.head.language is None:
        return counted
    asked = labels.cpu() != IGNORED
    if model.encoder is None:  # position t predicts label t + 1
        asked = torch.cat((asked[:, 1:], torch.zeros(shape[0], 1, dtype=torch.bool)), 1)
    return counted & asked.flatten()


def split(batches: Sequence[Batch], most_tokens: int) -> tuple[list[Batch], list[Batch]]:
    """The rows to fit on and every eighth one, to choose by; as many as hold `most_tokens` positions.

    Fewer than two rows cannot be split: there is nothing held out then.
    """
    fitted: list[Batch] = []
    held: list[Batch] = []
    row = positions = 0
    rows = sum(_rows(batch) for batch in batches)
    every = min(_HELD_EVERY, max(rows, 2))
    for batch in batches:
        if positions >= most_tokens and held:
            break
        numbers = torch.arange(row, row + _rows(batch))
        row += len(numbers)
        positions += max(tensor.numel() for tensor in batch.values())
        for into, wanted in ((fitted, numbers % every != every - 1), (held, numbers % every == every - 1)):
            if wanted.any():
                into.append({key: tensor[wanted.to(tensor.device)] for key, tensor in batch.items()})
    return fitted, held


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
