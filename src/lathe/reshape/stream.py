"""A model whose weights come when a module runs and go when it has run, and text that passes it layer by layer.

The modules are the ones of every other model; they stand on the meta device until they are called. Calling the model
as usual reads every weight once for each batch. `run_text` reads each layer once for all batches: their streams wait
on the disk before a layer, all of them pass it, and then the next layer is read. What a listener hears is the same,
batch after batch in the same order, so that its sums come out the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture
from lathe.model.transformer import Transformer
from lathe.reshape.spill import Tensors, release
from lathe.reshape.state import State
from lathe.reshape.walk import Streams, entered, stack_of, through

if TYPE_CHECKING:
    from lathe.reshape.calibrate import Batch

# Told which batch is about to run, and through which stack.
Hear: TypeAlias = "Callable[[Batch, str], None]"


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
        is_freed = False
        for module in owners:
            self._uses[module] -= 1
            if self._uses[module]:
                continue
            is_freed = True
            for name in _own(module):
                bare = torch.empty_like(getattr(module, name), device="meta")
                is_buffer = name in module._buffers
                setattr(module, name, bare if is_buffer else nn.Parameter(bare, requires_grad=False))
        if is_freed:
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


def whole(model: Transformer) -> Transformer:
    """The model with all of its weights in memory, where they can be trained."""
    if not isinstance(model, StreamedTransformer):
        return model
    made = Transformer(model.architecture, device="meta")
    made.load_state_dict({name: model.tensors[name].clone() for name in model.tensors}, assign=True)
    return made.requires_grad_(True)


def blank(model: Transformer) -> Tensors:
    """A place for what is gathered over the text: on the disk where the model is streamed."""
    return Tensors(model.tensors.folder if isinstance(model, StreamedTransformer) else None)


def model_of(state: State, dtype: torch.dtype, device: torch.device | str = "cpu") -> Transformer:
    """A state as a model that evaluates, streamed where the state is; a plain one shares the state's memory.

    Args:
        device: of a plain one.
    """
    cast = state.cast(dtype)
    if isinstance(cast.tensors, Tensors):
        return StreamedTransformer(cast.architecture, cast.tensors)
    model = Transformer(cast.architecture, device="meta")
    model.load_state_dict({n: t.detach().to(device) for n, t in cast.tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()


def held(model: Transformer, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Keep the weights of these modules over many calls, where the model is streamed."""
    return model.holding(modules) if isinstance(model, StreamedTransformer) else nullcontext()


def heads_held(model: Transformer) -> AbstractContextManager[None]:
    """Keep what turns the last stream into predictions."""
    return held(model, [model.head, model.embedding.tokens])


def layer_parts(model: Transformer, name: str, layers: range) -> list[nn.Module]:
    """The modules of some layers of a stack, each once; none where they are more than one layer's."""
    stack = stack_of(model, name)
    kinds: list[dict[nn.Module, None]] = [{}, {}]
    for number in layers:
        layer = stack.layer(number)
        kinds[0] |= dict.fromkeys(each for each in (layer.attention, layer.cross_attention) if each is not None)
        kinds[1][layer.feed_forward] = None
    most = 1 + (stack.cross_attention is not None), 1
    return [each for kind in kinds for each in kind] if all(len(k) <= n for k, n in zip(kinds, most)) else []


# --- text through a model, layer by layer


def entering(model: Transformer, name: str, batches: Sequence[Batch], *, memories: Streams | None = None) -> Streams:
    """The batches as they enter a stack.

    Args:
        memories: what the encoder before a decoder left of each; it is run where this is left out.
    """
    return _entering(model, name, batches, _deaf, memories)


def _entering(model: Transformer, name: str, batches: Sequence[Batch], hear: Hear, memories: Streams | None) -> Streams:
    if memories is None and name == "decoder" and model.encoder is not None:
        memories = left_by(model, "encoder", batches, hear=hear)
    streams = Streams(blank(model))
    with held(model, [model.embedding, stack_of(model, name).input]):
        for number, batch in enumerate(batches):
            hear(batch, name)
            streams.add(entered(model, name, batch, None if memories is None else memories[number].x_BTD))
    return streams


def advance(
    model: Transformer,
    name: str,
    streams: Streams,
    layer: int,
    moved: Callable[[int, Tensor, Tensor], None] | None = None,
    *,
    hear: Callable[[int], None] = lambda number: None,
) -> None:
    """Move every batch past one layer.

    Args:
        moved: told a batch's number and its stream before and after.
        hear: told which batch is about to run.
    """
    layers = range(layer, layer + 1)
    with held(model, layer_parts(model, name, layers)):
        for number in range(len(streams)):
            hear(number)
            batch = streams[number]
            after_BTD = through(model, name, batch, layers)
            if moved is not None:
                moved(number, batch.x_BTD, after_BTD)
            streams.move(number, after_BTD)


def left_by(model: Transformer, name: str, batches: Sequence[Batch], *, hear: Hear | None = None) -> Streams:
    """What a stack leaves of each batch, after its last norm: `[number].x_BTD`."""
    hears = hear or _deaf
    streams = _entering(model, name, batches, hears, None)
    spec = dict(model.architecture.stacks)[name]
    if spec.sharing.attention or spec.sharing.feed_forward:
        # What shared modules are given is heard batch by batch, as in a model that is in memory.
        layers = range(spec.n_layers)
        with held(model, layer_parts(model, name, layers)):
            for number, batch in enumerate(batches):
                hears(batch, name)
                streams.move(number, through(model, name, streams[number], layers))
    else:
        for layer in range(spec.n_layers):
            advance(model, name, streams, layer, hear=lambda number: hears(batches[number], name))
    leaving(model, name, streams, hear=lambda number: hears(batches[number], name))
    return streams


def leaving(
    model: Transformer, name: str, streams: Streams, *, hear: Callable[[int], None] = lambda number: None
) -> None:
    """Move every batch past a stack's last norm."""
    stack = stack_of(model, name)
    with held(model, [] if stack.norm is None else [stack.norm]):
        for number in range(len(streams)):
            hear(number)
            streams.move(number, stack.leave(streams[number].x_BTD))


def last_streams(model: Transformer, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with what the model's heads read of it, B × T × D; the heads do not run.

    All of the batches have passed a streamed model, layer by layer, by the time that this returns.
    """
    return _last_streams(model, batches, _deaf)


def _last_streams(model: Transformer, batches: Iterable[Batch], hear: Hear) -> Iterator[tuple[Batch, Tensor]]:
    name, spec = list(model.architecture.stacks)[-1]
    # The matrix that lifts both stacks' embeddings is heard for one stack after the other, wherever the model is.
    lifts_both = model.encoder is not None and name == "decoder" and model.embedding.projection is not None
    if isinstance(model, StreamedTransformer) or lifts_both:
        every = list(batches)
        streams = left_by(model, name, every, hear=hear)
        return ((batch, streams[number].x_BTD) for number, batch in enumerate(every))

    def one_by_one() -> Iterator[tuple[Batch, Tensor]]:
        for batch in batches:
            hear(batch, name)
            one = entered(model, name, batch)
            yield batch, stack_of(model, name).leave(through(model, name, one, range(spec.n_layers)))

    return one_by_one()


def run_text(model: Transformer, batches: Iterable[Batch], hear: Hear) -> None:
    """Run text through a model's stacks for those who listen to them; the heads are left out.

    Through a streamed model the text goes layer by layer, so a batch comes up once for each layer.

    Args:
        hear: told which batch is about to run, and through which stack; of a model in memory, the last one.
    """
    for _ in _last_streams(model, batches, hear):
        pass


def _deaf(batch: Batch, stack: str) -> None:
    """Nobody listens."""
