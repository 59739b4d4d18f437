"""Open a model: a directory, a hub id, an adapter's directory, or an object of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lathe.adapt.opening import base_of, is_adapter, open_adapted_as, tokenizer_of
from lathe.api.model import Model
from lathe.architecture import Architecture
from lathe.checkpoint.load import Checkpoint, of_one_type, open_checkpoint
from lathe.errors import RequestError
from lathe.families import class_name, family, read_config
from lathe.families.adapter import Reader

if TYPE_CHECKING:
    from lathe.model.codes import Codes


def load(
    model: Any,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Load a model: a directory, a hub id, or a model object of `transformers`.

    The directory of an adapter (`lathe.adapt`) gives the base that it names with the adapter on it.

    Args:
        revision: a branch, tag or commit of the hub's repository.
        device: where to put the weights; the CPU where left out.
        dtype: what to convert the weights to; what the file holds where left out.

    Raises:
        RequestError: no such model, files missing or damaged, an unknown family, or tensors that do not fit the config.

    Example:
        >>> import lathe, tempfile
        >>> tiny = lathe.preset("t5-small").with_(d_model=32, d_ff=64, n_layers=1, vocab_size=64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lathe.Model(tiny, seed=0).save(folder + "/tiny")
        ...     lathe.load(folder + "/tiny").architecture.d_model
        32
    """
    if isinstance(model, torch.nn.Module):
        return _from_object(model, device, dtype)
    if is_adapter(model):
        if revision is not None:
            raise RequestError(f"revision={revision}: {model} is an adapter's directory, which has none; leave it out")
        return load_adapted(base_of(model), model, device=device, dtype=dtype)
    checkpoint = open_checkpoint(model, revision, quantized=True)
    loaded = Model.from_checkpoint(checkpoint, device=device, dtype=dtype)
    loaded.name = str(model)
    return loaded


def load_adapted(
    base: str,
    adapter: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """A base with an adapter on it, under the head and the sharing of layers that the adapter was made for.

    Args:
        base: a directory or a hub id.
        adapter: the adapter's directory; its tokenizer, where it has one, goes before the base's.

    Raises:
        RequestError: no such base, no adapter, or one that does not fit the base.
    """

    def make(architecture: Architecture, tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]) -> Model:
        return Model(architecture, tensors, codes=codes, device=device, dtype=dtype)

    model, checkpoint = open_adapted_as(base, adapter, make)
    model.tokenizer = tokenizer_of(adapter, checkpoint)
    model.generation = dict(checkpoint.generation)
    if model.architecture == checkpoint.architecture:
        model.config = dict(checkpoint.config)
    return model


class _ObjectSource:
    """A `transformers` model's weights as a source of tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = model.state_dict()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        tensor: Tensor = self._tensors[name]
        return tensor.dtype

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor.detach().clone()


def _from_object(model: torch.nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> Model:
    config_object = getattr(model, "config", None)
    if config_object is None or not hasattr(config_object, "to_dict"):
        raise RequestError(
            f"cannot load a {type(model).__name__}: expected a directory, a hub id or a transformers model"
        )
    config = {**config_object.to_dict(), "architectures": [type(model).__name__]}
    architecture = read_config(config)
    source = family(config["model_type"])
    class_name(config, source)
    generation = getattr(model, "generation_config", None)
    settings = generation.to_diff_dict() if generation is not None else {}
    held = _ObjectSource(model)
    parameters = of_one_type(Reader(source, architecture, held), held)
    loaded = Model.from_checkpoint(Checkpoint(parameters, None, config, settings), device=device, dtype=dtype)
    return loaded.train(model.training)
