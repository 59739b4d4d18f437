"""A model written as a directory that stock `transformers` opens, or in Lathe's own form where no family can hold it.

The directory appears whole or not at all (`lathe.checkpoint.atomic`). A stock directory holds `config.json`,
safetensors, the generation settings and the tokenizer's files. Lathe's own holds `lathe.json` in place of the
config, and the blueprint's names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lathe._version import __version__
from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.atomic import atomic_directory
from lathe.checkpoint.load import CONFIG, GENERATION, OWN
from lathe.families import holder, objections, write_config
from lathe.families.adapter import fuse, to_disk

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SHARD_BYTES = 5_000_000_000


class Companion(Protocol):
    """What travels with a model and writes its own files (a tokenizer)."""

    def save(self, directory: Path) -> object:
        """Write the files into `directory`."""
        ...


@dataclass(frozen=True)
class Saved:
    """Where a model was written and in which form.

    Args:
        stock: whether stock `transformers` opens it; if not, `reasons` says why its family cannot hold it.
    """

    directory: Path
    stock: bool
    reasons: tuple[str, ...]


def save_checkpoint(
    directory: str | Path,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Companion | None = None,
    generation: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
) -> Saved:
    """Write a model.

    Args:
        directory: must not exist, unless `replace`.
        tensors: the blueprint's names to tensors; read one at a time.
        generation: settings for `generation_config.json`.
        config: the config that the model was read with; keys that Lathe does not write are kept.
        extra: other text files to write, name to content.
        max_shard_bytes: the size past which the weights are split.

    Raises:
        RequestError: `directory` exists.
        LatheError: the disk is full; nothing is left behind.
    """
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_directory(directory, replace=replace, nbytes=nbytes) as folder:
        saved = write_checkpoint(
            folder,
            architecture,
            tensors,
            tokenizer=tokenizer,
            generation=generation,
            config=config,
            max_shard_bytes=max_shard_bytes,
        )
        for name, text in (extra or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return dataclasses.replace(saved, directory=Path(directory))


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Companion | None = None,
    generation: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Saved:
    """Write a model's files into a directory that is there and empty, such as one that `atomic_directory` made.

    The arguments are those of `save_checkpoint`, which publishes the directory as well.
    """
    from lathe.checkpoint.tensors import write_tensors

    stock = holder(architecture) is not None
    if stock:
        _write_json(folder / CONFIG, _stock_config(architecture, tensors, config))
        write_tensors(folder, _stock_tensors(architecture, tensors), max_shard_bytes=max_shard_bytes)
    else:
        _write_json(folder / OWN, {"lathe": __version__, "architecture": architecture.to_dict()})
        own = ((p.name, tensors[p.name]) for p in stored(architecture))
        write_tensors(folder, own, max_shard_bytes=max_shard_bytes)
    if generation:
        _write_json(folder / GENERATION, generation)
    if tokenizer is not None:
        tokenizer.save(folder)
    return Saved(folder, stock, tuple(each.reason for each in objections(architecture)))


def _stock_config(
    architecture: Architecture, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> dict[str, Any]:
    dtype = str(tensors["embedding.tokens.weight"].dtype).removeprefix("torch.")
    return {**write_config(architecture, config), "dtype": dtype}


def _stock_tensors(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    family = holder(architecture)
    assert family is not None
    for name, _, entry in to_disk(family, architecture):
        yield name, fuse(entry, [tensors[ours].detach() for ours in entry.ours])


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
