"""Which computes a model's passes: the native step, recorded steps or the modules.

`auto` is the native step wherever it gives what the modules give: on the CPU, in float32 or with the model's own
quantised layers. On a GPU it records the modules' steps and replays them (`lathe.engine.graphs`). Where it cannot, the
modules serve, and nothing is said: all are right. `native` says why, where it cannot; `torch` is the modules.

A model's programs are made once and kept beside it. They are made anew when a weight has changed since, in place or
for another tensor.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor, nn

from lathe.engine.engine import Engine
from lathe.engine.graphs import Graphs
from lathe.engine.program import Programs
from lathe.errors import RequestError
from lathe.model.transformer import Transformer

log = logging.getLogger("lathe")

ENGINES = ("auto", "native", "torch")

Reader = Transformer | Engine | Graphs
"""What reads tokens: a model, or what stands in its place. All are called alike and answer alike."""

_State = tuple[object, ...]
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[_State, Programs]] = weakref.WeakKeyDictionary()
_said: set[str] = set()


def reader(model: Transformer, engine: str | Engine = "auto") -> Reader:
    """The model itself, or the engine that computes its passes.

    Args:
        model: what is to be read with, in evaluation or about to be.
        engine: `auto`, `native` or `torch`; or an `Engine` of this model, as one with packed weights.

    Raises:
        RequestError: another word, or an engine of another model.
    """
    if isinstance(engine, Engine):
        if engine.model is not model:
            raise RequestError("engine: this engine is of another model; make one of the model that is run")
        return engine
    if engine not in ENGINES:
        raise RequestError(f"engine={engine!r}: expected {', '.join(ENGINES)}, or an Engine of the model")
    if engine == "torch":
        return model
    if engine == "auto" and model.device.type == "cuda":
        return model if _hooked(model) else Graphs(model)
    found = Engine(model, programs=_programs(model))
    if found.reason is None:
        return found
    if engine == "native" and found.reason not in _said:
        _said.add(found.reason)
        log.warning("engine=native: PyTorch's modules compute instead; %s", found.reason)
    return model


def _hooked(model: nn.Module) -> bool:
    """Whether a module calls what is not its own, which a recording would call once."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _programs(model: Transformer) -> Programs:
    state = _state(model)
    kept = _kept.get(model)
    if kept is None or kept[0] != state:
        kept = _kept[model] = state, Programs.of(model, "float32", None, torch.get_num_threads())
    return kept[1]


def _state(model: Transformer) -> _State:
    """What a program of the model depends on: its modules and hooks, its tensors and how often each was written to."""
    found: list[object] = []
    for module in model.modules():
        found.append((type(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found.append(None if tensor is None else (tensor.data_ptr(), tensor.dtype, _writes(tensor)))
    return tuple(found)


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
