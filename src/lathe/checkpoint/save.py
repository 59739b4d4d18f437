"""A model written as a directory that stock `transformers` opens, or in Lathe's own form where no family can hold it.

The directory appears whole or not at all (`lathe.checkpoint.atomic`). A stock directory holds `config.json`,
safetensors, the generation settings and the tokenizer's files. Lathe's own holds `lathe.json` in place of the
config, and the blueprint's names. Quantised matrices are written in either as `lathe.checkpoint.compressed` says.
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
from lathe.checkpoint.compressed import INT, KEY, PACKED, Scheme, scales_again, to_config, to_tensors
from lathe.checkpoint.load import CONFIG, GENERATION, OWN
from lathe.errors import RequestError
from lathe.families import holder, objections, write_config
from lathe.families.adapter import fuse, tied_names, to_disk
from lathe.families.base import Entry, Family

if TYPE_CHECKING:
    from torch import Tensor

    from lathe.model.codes import Codes

DEFAULT_SHARD_BYTES = 5_000_000_000
_TABLE = "embedding.tokens.weight"


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
    codes: Mapping[str, Codes] | None = None,
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
        codes: the quantised matrices, by the blueprint's names; they are none of `tensors`.
        extra: other text files to write, name to content.
        max_shard_bytes: the size past which the weights are split.

    Raises:
        RequestError: `directory` exists.
        LatheError: the disk is full; nothing is left behind.
    """
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    nbytes += sum(each.nbytes for each in (codes or {}).values())
    with atomic_directory(directory, replace=replace, nbytes=nbytes) as folder:
        saved = write_checkpoint(
            folder,
            architecture,
            tensors,
            tokenizer=tokenizer,
            generation=generation,
            config=config,
            codes=codes,
            max_shard_bytes=max_shard_bytes,
        )
        for name, text in (extra or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return dataclasses.replace(saved, directory=Path(directory))


def with_tokens(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings with the token ids that they do not say.

    Beside a file of settings stock `transformers` asks the config for none, and would never stop.
    """
    return {**{name: config[name] for name in _TOKENS if config.get(name) is not None}, **generation}


_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Companion | None = None,
    generation: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    codes: Mapping[str, Codes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Saved:
    """Write a model's files into a directory that is there and empty, such as one that `atomic_directory` made.

    The arguments are those of `save_checkpoint`, which publishes the directory as well.
    """
    from lathe.checkpoint.tensors import write_tensors

    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes={max_shard_bytes!r}: expected a number of bytes, such as 2_000_000_000")
    codes = codes or {}
    family = holder(architecture)
    reasons = [each.reason for each in objections(architecture)]
    if family is not None:
        reasons = quantised_objections(family, architecture, codes)
    if family is not None and not reasons:
        parts = _stock_parts(family, architecture, tensors, codes)
        described = _stock_config(architecture, tensors, codes, config)
    else:
        family, parts = None, _own_parts(architecture, tensors, codes)
        described = {"lathe": __version__, "architecture": architecture.to_dict()}
    if codes:
        described[KEY] = to_config(_schemes(family, architecture, codes))
    _write_json(folder / (OWN if family is None else CONFIG), described)
    write_tensors(folder, parts, max_shard_bytes=max_shard_bytes)
    if generation:
        _write_json(folder / GENERATION, with_tokens(generation, described))
    if tokenizer is not None:
        tokenizer.save(folder)
    return Saved(folder, family is not None, tuple(reasons))


def _stock_config(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    codes: Mapping[str, Codes],
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    table = codes[_TABLE].scales_OG if _TABLE in codes else tensors[_TABLE]
    return {**write_config(architecture, config), "dtype": str(table.dtype).removeprefix("torch.")}


def _stock_parts(
    family: Family, architecture: Architecture, tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a stock file."""
    for name, _, entry in to_disk(family, architecture):
        matrix = codes.get(entry.ours[0])
        if matrix is None:
            yield name, fuse(entry, [tensors[ours].detach() for ours in entry.ours])
            continue
        yield from to_tensors(_module(name), matrix, _scheme(matrix)).items()
        if name == entry.theirs:
            for other in _other_modules(family, architecture, entry):
                if f"{other}.weight" not in entry.written:
                    yield from scales_again(other, matrix).items()


def _own_parts(
    architecture: Architecture, tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of Lathe's own form."""
    for parameter in stored(architecture):
        matrix = codes.get(parameter.name)
        if matrix is None:
            yield parameter.name, tensors[parameter.name].detach()
        else:
            yield from to_tensors(_module(parameter.name), matrix, _scheme(matrix)).items()


# --- quantised matrices ----------------------------------------------------------------------------------


def quantised_objections(family: Family, architecture: Architecture, codes: Mapping[str, Codes]) -> list[str]:
    """Why stock `transformers` could not open a family's file with these matrices quantised; nothing where it can."""
    for entry in family.entries(architecture):
        if not any(name in codes for name in entry.ours):
            continue
        if entry.transposed or len(entry.ours) > 1:
            reason = (
                f"{family.name} keeps {entry.theirs} transposed (Conv1D), which compressed-tensors does not quantise"
            )
            return [reason]
        scheme = _scheme(codes[entry.ours[0]])
        if scheme.format == PACKED and _TABLE in entry.ours:
            return [f"transformers does not open a token table in packed codes, as {entry.theirs} is; 8 bits open"]
        if scheme.format == PACKED and not family.opens_packed:
            reason = f"transformers does not open a {family.name} with packed codes, as {entry.theirs} has"
            return [f"{reason}; 8 bits with a scale a row (--group 0) open"]
        if scheme.format == PACKED and not scheme.symmetric:
            return [f"transformers does not open packed codes with zero points, as {entry.theirs} has"]
        if scheme.format == PACKED and _other_modules(family, architecture, entry):
            reason = f"modules of a {family.name} share {entry.theirs}, and transformers does not share packed weights"
            return [reason]
    return []


def _schemes(family: Family | None, architecture: Architecture, codes: Mapping[str, Codes]) -> dict[str, Scheme]:
    """The scheme of every quantised module by the name that it has in the file."""
    if family is None:
        return {_module(name): _scheme(matrix) for name, matrix in codes.items()}
    found: dict[str, Scheme] = {}
    for entry in family.entries(architecture):
        if entry.ours[0] not in codes:
            continue
        scheme = _scheme(codes[entry.ours[0]])
        others = _other_modules(family, architecture, entry)
        # A table's own module looks rows up: only the tied head has inputs to round.
        looks_up = dataclasses.replace(scheme, activations="none") if entry.ours == (_TABLE,) else scheme
        found |= {_module(name): looks_up for name in entry.names}
        found |= {name: scheme for name in others if name not in found}
    return found


def _scheme(matrix: Codes) -> Scheme:
    whole = matrix.bits == 8 and matrix.group_size == 0 and matrix.zeros_OG is None
    symmetric = matrix.zeros_OG is None
    # What is not packed can be shared between modules, as a table is.
    return Scheme(matrix.bits, matrix.group_size, symmetric, matrix.activations, INT if whole else PACKED)


def _other_modules(family: Family, architecture: Architecture, entry: Entry) -> list[str]:
    """The other modules of a stock model that hold an entry's tensor."""
    names = [name for name in entry.names if name != entry.theirs]
    if entry.ours == (_TABLE,):
        names += sorted(tied_names(family, architecture))
    return [_module(name) for name in names]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
