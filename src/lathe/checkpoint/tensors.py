"""Tensors in and out of a checkpoint directory, one at a time.

*Reading.* A safetensors file is a header (name -> dtype, shape, offsets) and then the bytes of the tensors.
The file is mapped into memory, not read: a tensor is a view of the mapping, its pages come from the disk when
they are first touched, and the system may drop them again. A source maps one file at a time, and maps it
afresh after every 64 MiB, so a model that copies one tensor after the other never stands in memory twice. The
mapping is private: changing a tensor in place changes neither the file nor what is read from it later.
PyTorch pickles are mapped the same way, and only with the unpickler that builds tensors and refuses everything
else (`weights_only=True`): a pickle can run code.

*Writing.* The same format, written here directly so that one tensor at a time goes to the disk: it needs no
second copy of a shard, takes tensors that are not contiguous or share memory, and gives the same bytes for the
same tensors. The layout (shards, index) is the one of the Hugging Face libraries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from lathe.checkpoint.layout import (
    SAFETENSORS_INDEX,
    WEIGHT_FILES,
    Weights,
    find_weights,
    shard_name,
    unreadable,
)
from lathe.checkpoint.pickled import describe, is_dense, unpickle_tensors
from lathe.errors import LatheError, RequestError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from torch import Tensor

T = TypeVar("T")

# In the order in which a file holds them: the widest last in this list and first in the file, so that every
# tensor starts at a multiple of its element size.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}

_METADATA = "__metadata__"
DEFAULT_SHARD_BYTES = 5_000_000_000

# After so many bytes of tensors a file is mapped afresh, which costs about a millisecond: the pages of a
# mapping count as this process's memory as long as it lasts.
_REMAP_BYTES = 64 * 2**20


# --- reading -------------------------------------------------------------------------------------------


def open_tensors(directory: str | os.PathLike[str]) -> TensorSource:
    """Open the weights of a checkpoint directory, whichever of the usual files they are in.

    Looked for in this order: `model.safetensors`, its shards with their index, `pytorch_model.bin`, its
    shards. Every file is opened and its header checked against the index; no tensor is read.

    Raises:
        RequestError: nothing there, a missing or truncated file, a damaged header or index, an index that the
            shards contradict, a pickle that holds anything but tensors.

    Example:
        with open_tensors("t5-small") as source:
            embedding_VD = source.tensor("shared.weight")
    """
    return TensorSource(find_weights(Path(directory)))


class TensorSource:
    """The tensors of a checkpoint by name, each read when it is asked for. Made by `open_tensors`.

    One file is open at a time, the one last asked for: go through the names in the order of `names()` and
    every file is opened once. A tensor stays valid after the source moves on or is closed. Not for sharing
    between threads.
    """

    def __init__(self, weights: Weights) -> None:
        self._pickled = weights.pickled
        self._shard: _Shard | None = None
        self._handed_out = 0  # bytes, since the shard was opened
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._closed = False
        self._entries: dict[str, _Entry] = {}
        weight_map = weights.weight_map or {}
        for path in weights.files:
            for name, entry in self._opened(path).entries().items():
                if weight_map.get(name, path) != path:
                    continue  # two shards hold the name; the index chooses
                if name in self._entries:
                    raise RequestError(
                        f"{path.name} and {self._entries[name].file.name} in {path.parent} both hold {name}, and "
                        f"{weights.index} does not say which counts: remove the shard that is not meant"
                    )
                self._entries[name] = entry
        for name, path in weight_map.items():
            if name not in self._entries:
                raise RequestError(f"{weights.index} says that {name} is in {path.name}, which does not hold it")

    def names(self) -> list[str]:
        """The names of all tensors, file after file, as they lie in it."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone; KeyError if there is no such name."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header alone; KeyError if there is no such name."""
        return self._entries[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, as a view of the mapped file; KeyError if there is none.

        Each name gives its tensor in full, whether or not the file ties it to another.

        Raises:
            LatheError: the file was changed or replaced after the source was opened.
        """
        if self._closed:
            raise ValueError("the tensor source is closed")
        entry = self._entries[name]
        if self._shard is not None and self._shard.mapped and self._handed_out > _REMAP_BYTES:
            self._shard = None
        shard = self._opened(entry.file)
        self._handed_out += entry.nbytes
        return shard.tensor(name)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every name with its tensor, one after the other, in the order of `names()`."""
        for name in self._entries:
            yield name, self.tensor(name)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors; what names share is counted for each."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        return {name: entry.file for name, entry in self._entries.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Let go of the open file. Tensors already read stay valid."""
        self._shard = None
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, path: Path) -> _Shard:
        if self._shard is None or self._shard.path != path:
            self._shard = None  # before the next one opens: two shards are never held at once
            if self._stamps.setdefault(path, _stamp(path)) != _stamp(path):
                raise LatheError(f"{path} changed while tensors were read from it: open {path.parent} again")
            self._shard = _PickleShard(path) if self._pickled else _SafetensorsShard(path)
            self._handed_out = 0
        return self._shard


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to, or when another one takes its name."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, "weights", error) from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.dtype.itemsize


class _Shard(Protocol):
    """One open file of tensors; `mapped` if its tensors are views of the file."""

    path: Path
    mapped: bool

    def entries(self) -> dict[str, _Entry]: ...

    def tensor(self, name: str) -> Tensor: ...


class _SafetensorsShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = True
        try:
            self._file: Any = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise unreadable(path, "safetensors", error) from error

    def entries(self) -> dict[str, _Entry]:
        entries = {}
        for name in self._file.offset_keys():
            header = self._file.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            if dtype is None:
                raise RequestError(
                    f"{self.path}: {name} has dtype {header.get_dtype()}; expected one of {', '.join(_DTYPES)}"
                )
            entries[name] = _Entry(self.path, tuple(header.get_shape()), dtype)
        return entries

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _PickleShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self.mapped = unpickle_tensors(path)

    def entries(self) -> dict[str, _Entry]:
        return {name: _Entry(self.path, tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


# --- writing -------------------------------------------------------------------------------------------


def write_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as shards with an index where they need more than one.

    Tensors are taken in the order given and put into a shard until the next one would not fit; one that is
    larger than a shard gets its own. Given an iterable that makes tensors on the way, at most one shard of
    them is held. Names that share memory are each written in full. The same tensors in the same order give the
    same bytes.

    A directory made by `atomic_directory` is the place to write to; on an exception the files begun here are
    removed all the same.

    Args:
        directory: an existing directory without weights.
        tensors: name -> dense tensor, on any device.
        max_shard_bytes: the bytes of tensors in one file.
        metadata: text for the header of every file; `{"format": "pt"}` unless given, which `transformers` asks for.

    Returns:
        The files written: the shards in order, then the index if there is one.

    Raises:
        RequestError: no such directory, weights already in it, or a shard size below 1.
        ValueError: no tensors, a name twice, or a tensor that cannot be written (sparse, quantized, meta).
    """
    folder = Path(directory)
    _require_fresh(folder)
    if max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes is {max_shard_bytes}: expected at least 1 byte")
    header = {"format": "pt"} if metadata is None else dict(metadata)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    written: list[Path] = []
    contents: list[list[str]] = []
    total = 0
    try:
        for shard in _shards(pairs, max_shard_bytes):
            # Its name will say how many shards there are, which is known only at the end.
            written.append(folder / f"shard-{len(written) + 1:05d}.part")
            contents.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
            _write_file(written[-1], shard, header)
            shard.clear()  # let go of it before the next one is gathered
        if not written:
            raise ValueError("there are no tensors to write")
        for number, part in enumerate(written, start=1):
            written[number - 1] = part.rename(folder / shard_name(number, len(written)))
        if len(written) > 1:
            written.append(folder / SAFETENSORS_INDEX)
            written[-1].write_text(_index(written, contents, total), encoding="utf-8")
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _index(shards: list[Path], contents: list[list[str]], total: int) -> str:
    weight_map = {tensor: shard.name for shard, names in zip(shards, contents) for tensor in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _require_fresh(folder: Path) -> None:
    """Old weights beside new ones could be read instead of them."""
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a directory: make it before tensors are written to it")
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            raise RequestError(f"{folder} already holds {name}: write to a new directory")


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of each file's tensors, as `write_tensors` would put them, from the bytes of each.

    >>> split({"a": 3, "b": 9, "c": 2, "d": 4}, 5)
    [['b'], ['a', 'c'], ['d']]
    """
    return [list(file) for file in _grouped(sizes.items(), int, limit)]


def _shards(pairs: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    def checked() -> Iterator[tuple[str, Tensor]]:
        seen: set[str] = set()
        for name, tensor in pairs:
            _require_writable(name, tensor)
            if name in seen:
                raise ValueError(f"tensor {name} was given twice")
            seen.add(name)
            yield name, tensor

    return _grouped(checked(), lambda tensor: tensor.nbytes, limit)


def _grouped(pairs: Iterable[tuple[str, T]], nbytes: Callable[[T], int], limit: int) -> Iterator[dict[str, T]]:
    current: dict[str, T] = {}
    size = 0
    for name, each in pairs:
        if nbytes(each) > limit:
            yield {name: each}
            continue
        if size + nbytes(each) > limit:
            yield current
            current, size = {}, 0
        current[name] = each
        size += nbytes(each)
    if current:
        yield current


def _require_writable(name: str, tensor: Tensor) -> None:
    if name == _METADATA:
        raise ValueError(f"a tensor cannot be named {_METADATA}: the format keeps that name for itself")
    if not is_dense(tensor) or tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"{name} is {describe(tensor)}: expected a dense tensor of {', '.join(_DTYPES)}")


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file: the length of the header (8 bytes), the header, the tensors."""
    order = sorted(tensors, key=lambda name: (-_DTYPE_RANK[tensors[name].dtype], name))
    header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            dense = tensors[name].detach().cpu().contiguous()
            file.write(dense.reshape(-1).view(torch.uint8).numpy().data)
