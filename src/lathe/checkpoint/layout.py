"""Which files a checkpoint directory holds, as the Hugging Face libraries name them.

Weights stand either in one file (`model.safetensors`) or in numbered shards, with an index beside them
(`model.safetensors.index.json`) whose `weight_map` says which shard holds each tensor. Older checkpoints
have the same two forms as PyTorch pickles (`pytorch_model.bin`). Needs no torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# In the order in which they are looked for: what is safe to read before pickles, one file before shards.
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)


_LFS_START = b"version https://git-lfs"


@dataclass(frozen=True)
class Weights:
    """Where the tensors of a directory are.

    Attributes:
        files: the files that hold tensors, each once, in order.
        weight_map: tensor name -> file, as the index says; None where one file holds everything.
        index: the index file, or None.
        pickled: whether the files are PyTorch pickles, not safetensors.
    """

    files: tuple[Path, ...]
    weight_map: dict[str, Path] | None
    index: Path | None
    pickled: bool


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 1) of `count`; one shard alone is `model.safetensors`."""
    return SAFETENSORS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def find_weights(directory: Path) -> Weights:
    """Find the weight files of `directory`; safetensors are preferred to pickles, one file to shards.

    Raises:
        RequestError: no such directory; none of the files; a damaged index; a missing shard.
    """
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise RequestError(f"{directory} {what}: give a directory that holds {SAFETENSORS}")
    for name in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            pickled = name in (PICKLE, PICKLE_INDEX)
            if name in (SAFETENSORS, PICKLE):
                return Weights((path,), None, None, pickled)
            return _sharded(path, pickled)
    found = sorted(entry.name for entry in directory.iterdir())
    raise RequestError(
        f"{directory} holds no weights: expected {_either(WEIGHT_FILES)}; found {_listed(found) or 'nothing'}"
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> name of the file in the same directory that holds it.

    Raises:
        RequestError: the file is not an index, or names a file outside its directory.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{index} is not a readable index of weights: {one_line(error)}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} is not an index of weights: it has no weight_map of tensor name to file")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise RequestError(
                f"{index} says that {tensor} is in {name!r}: expected the name of a file in the same directory"
            )
    return dict(weight_map)


def one_line(error: object, limit: int = 300) -> str:
    """What an exception says, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def starts_with(path: Path, start: bytes) -> bool:
    """Whether the file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(start)) == start


def unreadable(path: Path, kind: str, error: Exception) -> RequestError:
    """The error for a file of weights that cannot be read, with the reason that the reader gave."""
    with suppress(OSError):
        if starts_with(path, _LFS_START):
            return RequestError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there")
    reason = one_line(error, limit=160)
    return RequestError(f"{path} is not a readable file of {kind} ({reason}): copy or download it again")


def _sharded(index: Path, pickled: bool) -> Weights:
    weight_map = {tensor: index.parent / name for tensor, name in read_weight_map(index).items()}
    files = tuple(sorted(set(weight_map.values())))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise RequestError(
            f"{index} names {_listed(missing)}, which {index.parent} does not hold: copy or download it again"
        )
    return Weights(files, weight_map, index, pickled)


def _is_plain_name(name: str) -> bool:
    """Whether `name` stays in its directory: an index comes from somebody else."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def _listed(names: list[str], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
