"""A model whose weights come when a module runs and go when it has run, and text that passes it layer by layer.

The modules are the ones of every other model; they stand on the meta device until they are called. Calling the model
as usual reads every weight once for each batch. `run_text` reads each layer once for many batches: their streams are
held before a layer, all of them pass it, and then the next layer is read. What a listener hears is the same, batch
after batch in the same order, so that its sums come out the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture
from lathe.model.mask import drop_if_full
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer
from lathe.reshape.spill import Tensors, release
from lathe.reshape.walk import Held, entered, stack_of, through

if TYPE_CHECKING:
    from lathe.reshape.calibrate import Batch

_HELD_BYTES = 2**28  # of streams that wait for a layer together


class StreamedTransformer(Transformer):
    """A transformer that holds no weights but those of the modules that run; on the CPU, for evaluation alone.

    Args:
        tensors: the blueprint's names to tensors, each read whenever its module runs.
    """

    def __init__(self, architecture: Architecture, tensors: Tensors) -> None:
        super().__init__(architecture, device="meta", dtype=tensors["embedding.tokens.weight"].dtype)
        self.tensors = tensors
        self._uses: dict[nn.Module, int] = {}
        self._names = {module: name for name, module in self.named_modules()}
        self.requires_grad_(False).eval()
        for module in self.modules():
            needed = _needed(self, module)
            if needed:
                module.register_forward_pre_hook(lambda *_, needed=needed: self._fill(needed))
                module.register_forward_hook(lambda *_, needed=needed: self._empty(needed), always_call=True)

    @property
    def device(self) -> torch.device:
        """Where the weights are when they are there."""
        return torch.device("cpu")

    @contextmanager
    def holding(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Keep the weights of some modules, and of all that they contain, over many calls."""
        owners = [each for module in modules for each in module.modules() if _own(each)]
        self._fill(owners)
        try:
            yield
        finally:
            self._empty(owners)

    def _fill(self, owners: list[nn.Module]) -> None:
        for module in owners:
            self._uses[module] = self._uses.get(module, 0) + 1
            if self._uses[module] > 1:
                continue
            for name in _own(module):
                tensor = self.tensors[f"{self._names[module]}.{name}"]
                is_buffer = name in module._buffers
                setattr(module, name, tensor if is_buffer else nn.Parameter(tensor, requires_grad=False))

    def _empty(self, owners: list[nn.Module]) -> None:
        for module in owners:
            self._uses[module] -= 1
            if self._uses[module]:
                continue
            for name in _own(module):
                bare = torch.empty_like(getattr(module, name), device="meta")
                is_buffer = name in module._buffers
                setattr(module, name, bare if is_buffer else nn.Parameter(bare, requires_grad=False))
        release()


def _own(module: nn.Module) -> list[str]:
    """What a module itself holds, without what its parts hold."""
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    return [name for name, tensor in held.items() if tensor is not None]


def _needed(model: Transformer, module: nn.Module) -> list[nn.Module]:
    """Whose weights have to be there while `module` runs; none where its parts see to themselves."""
    if module is not model.head.language:
        return [module] if _own(module) else []
    spec = model.architecture.head.language
    assert spec is not None
    parts = [each for each in module.modules() if _own(each)]
    return [*parts, model.embedding.tokens] if spec.tied else parts


def weights_of(model: Transformer) -> Mapping[str, Tensor]:
    """A model's tensors by the blueprint's names, unread where the model is streamed."""
    return model.tensors if isinstance(model, StreamedTransformer) else model.state_dict()


def blank(model: Transformer) -> Tensors:
    """A place for what is gathered over the text: on the disk where the model is streamed."""
    return Tensors(model.tensors.folder if isinstance(model, StreamedTransformer) else None)


def run_text(model: Transformer, batches: Iterable[Batch], hear: Callable[[Batch], None]) -> None:
    """Run text through a model for those who listen to its stacks.

    A streamed model's heads are left out, and a batch comes up once for each layer.

    Args:
        hear: told which batch is about to run.
    """
    if not isinstance(model, StreamedTransformer):
        for batch in batches:
            hear(batch)
            model(**batch)
        return
    group: list[Batch] = []
    held = 0
    for batch in batches:
        group.append(batch)
        positions = sum(t.numel() for key, t in batch.items() if key.endswith("input_ids"))
        held += positions * model.architecture.d_model * model.dtype.itemsize
        if held >= _HELD_BYTES:
            _layer_by_layer(model, group, hear)
            group, held = [], 0
    if group:
        _layer_by_layer(model, group, hear)


def _layer_by_layer(model: StreamedTransformer, batches: list[Batch], hear: Callable[[Batch], None]) -> None:
    memories: list[Memory] = []
    for name, spec in model.architecture.stacks:
        stack, streams = stack_of(model, name), list[Held]()
        with model.holding([model.embedding, stack.input]):
            for number, batch in enumerate(batches):
                hear(batch)
                read: Mapping[str, Any] = {**batch, "encoder_outputs": memories[number]} if memories else batch
                streams.append(entered(model, name, read))
        for layer in range(spec.n_layers):
            parts = [
                stack.attention[spec.attention_index(layer)],
                stack.feed_forward[spec.feed_forward_index(layer)],
            ]
            if stack.cross_attention is not None:
                parts.append(stack.cross_attention[spec.attention_index(layer)])
            with model.holding(parts):
                for batch, held in zip(batches, streams, strict=True):
                    hear(batch)
                    held.x_BTD = through(model, name, held, range(layer, layer + 1))
        for batch, held in zip(batches, streams, strict=True):
            hear(batch)
            left_BTD = stack.leave(held.x_BTD)
            if name == "encoder":
                padding_BS = drop_if_full(batch.get("attention_mask"))
                memories.append(Memory(left_BTD, padding_BS, batch.get("segment_ids")))
