"""An adapter's directory together with its base: which base it names, which head it needs, and both as one model.

Which head it needs, and whose layers it was made for, is noted beside it (`lathe.adapt.notes`): where the base's layers
share weights and the adapter has its own part for each, the base's are copied, which changes nothing by itself. An
adapter that names no base and lies inside a model's directory is that model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lathe.adapt.adapters import folded_tensors, lora_layers
from lathe.adapt.files import load_adapter
from lathe.adapt.layer import Whole
from lathe.adapt.notes import adapted_architecture
from lathe.adapt.peft_config import CONFIG
from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.load import CONFIG as MODEL_CONFIG
from lathe.checkpoint.load import OWN, Checkpoint, open_checkpoint
from lathe.checkpoint.save import Saved, save_checkpoint
from lathe.errors import RequestError
from lathe.model.codes import Codes
from lathe.model.transformer import Transformer
from lathe.quantization.place import fill
from lathe.text.tokenizer import Tokenizer

M = TypeVar("M", bound=Transformer)


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter and no model of its own."""
    folder = Path(directory).expanduser()
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (MODEL_CONFIG, OWN))


def base_of(directory: str | Path) -> str:
    """The base that an adapter's config names: a directory or a hub id.

    Raises:
        RequestError: it names none, or a directory that is not here.
    """
    path = Path(directory).expanduser() / CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise RequestError(f"{path} is no JSON object ({error}); is the file complete?") from None
    if not isinstance(base, str) or not base:
        around = Path(directory).expanduser().absolute().parent
        if any((around / name).is_file() for name in (MODEL_CONFIG, OWN)):
            return str(around)
        raise RequestError(f"{path} names no base: give the base as the model, and the adapter beside it")
    if not Path(base).expanduser().exists() and (base[0] in "/.~" or base.count("/") > 1):
        raise RequestError(
            f"the adapter in {directory} was trained on {base}, which is not here: give the base as the model, and "
            "the adapter beside it (--adapter)"
        )
    return base


def _unshared(held: Mapping[str, Tensor], base: Architecture, wanted: Architecture) -> dict[str, Tensor]:
    """The base's tensors with a copy of a shared layer for each layer that has its own now."""
    out = dict(held)
    for name, stack in wanted.stacks:
        old = dict(base.stacks)[name]
        if old.sharing == stack.sharing:
            continue
        out = {key: tensor for key, tensor in out.items() if _KINDS.fullmatch(key.removeprefix(f"{name}.")) is None}
        for kind in ("attention", "cross_attention", "feed_forward"):
            index = "feed_forward_index" if kind == "feed_forward" else "attention_index"
            for layer in range(stack.n_layers):
                shared = f"{name}.{kind}.{getattr(old, index)(layer)}."
                own = f"{name}.{kind}.{getattr(stack, index)(layer)}."
                mine = {key: tensor for key, tensor in held.items() if key.startswith(shared)}
                out |= {own + key.removeprefix(shared): tensor.clone() for key, tensor in mine.items()}
    return out


_KINDS = re.compile(r"(?:attention|cross_attention|feed_forward)\..+")


def _plain(architecture: Architecture, tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]) -> Transformer:
    model = Transformer(architecture, seed=None, device="meta")
    fill(model, tensors, codes)
    return model


def open_adapted(base: str, adapter: str | Path) -> tuple[Transformer, Checkpoint]:
    """A base with an adapter on it, under the adapter's head and in the base's own type; and the base's checkpoint.

    Raises:
        RequestError: no such base, no adapter, or one that does not fit the base.
    """
    return open_adapted_as(base, adapter, _plain)


def open_adapted_as(
    base: str, adapter: str | Path, make: Callable[[Architecture, Mapping[str, Tensor], Mapping[str, Codes]], M]
) -> tuple[M, Checkpoint]:
    """The same as a model of another class.

    Args:
        make: builds the model that is returned from an architecture, all its tensors and its quantised matrices.

    Raises:
        RequestError: no such base, no adapter, or one that does not fit the base.
    """
    if not (Path(adapter).expanduser() / CONFIG).is_file():
        raise RequestError(f"{adapter} holds no {CONFIG}: expected an adapter that peft or lathe train wrote")
    checkpoint = open_checkpoint(base, quantized=True)
    architecture = adapted_architecture(adapter, checkpoint.architecture)
    # Under another head some of the base's matrices are not there.
    wanted = {p.name for p in stored(architecture)}
    codes = {name: matrix for name, matrix in checkpoint.codes.items() if name in wanted}
    if codes and architecture.with_({"head": checkpoint.architecture.head.to_dict()}) != checkpoint.architecture:
        raise RequestError(
            f"the adapter in {adapter} gives layers of {base} that share weights their own, and they are quantised "
            "here: give the base as it was before that"
        )
    stored_held = {name: checkpoint.parameters.tensor(name) for name in checkpoint.parameters.names()}
    held = _unshared(stored_held, checkpoint.architecture, architecture)
    dtype = next(iter(held.values())).dtype
    # A head of another size is another head.
    fresh = [p.name for p in stored(architecture) if p.name not in held or tuple(held[p.name].shape) != p.shape]
    empty = {p.name: torch.zeros(p.shape, dtype=dtype) for p in stored(architecture) if p.name in fresh}
    tensors = {p.name: empty[p.name] if p.name in empty else held[p.name] for p in stored(architecture)}
    model = make(architecture, {name: tensor for name, tensor in tensors.items() if name not in codes}, codes)
    load_adapter(model, Path(adapter).expanduser())
    whole = {path for path, layer in lora_layers(model) if isinstance(layer.running, Whole)}
    missing = [name for name in fresh if name.rpartition(".")[0] not in whole]
    if missing:
        raise RequestError(
            f"neither {base} nor the adapter in {adapter} has values for {missing[0]}: "
            "give the base that the adapter was trained on"
        )
    model.eval()
    return model, checkpoint


def tokenizer_of(adapter: str | Path, checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer beside an adapter, or else beside its base."""
    beside = [Path(adapter).expanduser(), *([checkpoint.directory] if checkpoint.directory is not None else [])]
    place = next((each for each in beside if Tokenizer.is_in(each)), None)
    return None if place is None else Tokenizer.load(place)


def merge_into_base(base: str, adapter: str | Path, destination: Path) -> Saved:
    """Write a base with an adapter folded in as a model of its own, with the tokenizer that is beside either.

    Raises:
        RequestError: what `open_adapted` refuses, or `destination` exists.
        LatheError: the disk is full; nothing is left behind.
    """
    model, checkpoint = open_adapted(base, adapter)
    if checkpoint.codes:
        raise RequestError(
            f"{base} is quantised, and an adapter folded into it would be rounded again: merge it into the model as it "
            "was before, and quantise the result"
        )
    return save_checkpoint(
        destination,
        model.architecture,
        folded_tensors(model),
        tokenizer=tokenizer_of(adapter, checkpoint),
        generation=checkpoint.generation,
        config=checkpoint.config if model.architecture == checkpoint.architecture else {},
    )
