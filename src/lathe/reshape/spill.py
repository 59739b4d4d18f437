"""Tensors that need not be in memory together: each is read when it is asked for.

An entry is a function that gives the tensor: from the shard of a checkpoint, from memory, or from a scratch file into
which an operation's result was put at once. So a model that is larger than memory passes through operations that
look at one parameter after the other, and no operation has to know. Numbers are kept as they were computed, in
float64, so that a streamed cut gives the bytes that an ordinary one gives; the scratch files take eight bytes for each
number that an operation changed, and go as soon as nothing refers to them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SMALL = 2**16  # bytes; what is smaller is kept in memory, where it costs less than a file

Read = Callable[[], Tensor]


class Tensors(MutableMapping[str, Tensor]):
    """Name → tensor.

    Args:
        folder: where tensors that are put in go; they stay in memory where left out.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._entries: dict[str, Read] = {}

    @classmethod
    def reading(cls, names: Iterable[str], read: Callable[[str], Tensor]) -> Tensors:
        """Tensors that `read` gives, such as those of an opened checkpoint."""
        made = cls()
        made._entries = {name: partial(read, name) for name in names}
        return made

    @classmethod
    def of(cls, others: Mapping[str, Tensor], folder: Path) -> Tensors:
        """The tensors of `others`, unread where they are; what is put in later goes to `folder`."""
        made = cls(folder)
        for name in others:
            made.take(name, others, name)
        return made

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name]()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self.folder is None or tensor.nbytes < _SMALL:
            self._entries[name] = partial(_given, tensor)
        else:
            self._entries[name] = _Scratch(self.folder, tensor)
            release()

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without reading it

    def __ior__(self, others: Mapping[str, Tensor]) -> Tensors:
        for name in others:
            self.take(name, others, name)
        return self

    def take(self, name: str, others: Mapping[str, Tensor], old: str) -> None:
        """Hold as `name` what `others` holds as `old`, unread where it can stay so."""
        if isinstance(others, Tensors):
            self._entries[name] = others._entries[old]
        else:
            self[name] = others[old]

    def copied(self) -> Tensors:
        """The same tensors, to be added to."""
        made = Tensors(self.folder)
        made._entries = dict(self._entries)
        return made

    def chosen(self, names: Iterable[str], change: Callable[[str, Tensor], Tensor]) -> Tensors:
        """Some of the tensors, each passed through `change` when it is read."""
        made = Tensors(self.folder)
        made._entries = {name: partial(_changed, change, name, self._entries[name]) for name in names}
        return made


class _Scratch:
    """A tensor in a file of its own, which goes when this does."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype
        handle, name = tempfile.mkstemp(suffix=".tensor", dir=folder)
        self._file = Path(name)
        self._gone = weakref.finalize(self, self._file.unlink, missing_ok=True)
        with os.fdopen(handle, "wb") as file:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __call__(self) -> Tensor:
        made = torch.empty(self._shape, dtype=self._dtype)
        with self._file.open("rb") as file:
            file.readinto(made.reshape(-1).view(torch.uint8).numpy().data)
        return made


def parked(value: Any, place: Tensors, name: str) -> Callable[[], Any]:
    """A record whose tensors are put into `place`, under names that start with `name`; the call gives it back."""
    if isinstance(value, Tensor):
        place[name] = value
        return partial(place.__getitem__, name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        parts = {each: parked(getattr(value, each), place, f"{name}.{each}") for each in fields}
        kind = type(value)
        return lambda: kind(**{each: part() for each, part in parts.items()})
    if isinstance(value, tuple):
        items = [parked(each, place, f"{name}.{number}") for number, each in enumerate(value)]
        return lambda: tuple(item() for item in items)
    return lambda: value


def release() -> None:
    """Give memory that was freed back to the system.

    The C library keeps freed blocks of up to 32 MB, and what is left between two that are in use is seldom large
    enough for the next tensor: after a while it would hold a good part of the model in holes.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`, where there is one."""
    found: Callable[[int], int] | None = None
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _changed(change: Callable[[str, Tensor], Tensor], name: str, read: Read) -> Tensor:
    return change(name, read())
