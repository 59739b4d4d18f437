"""Tensors between Hugging Face's names and Lathe's, in both directions, for every family.

A family's `entries` say which tensor on disk holds which parameters; here they are read and written.
Every stored tensor must be accounted for and every parameter must be found, with the blueprint's shape:
one too many, one too few or one of another shape is an error that names it.

The blueprint's tied parameters are not stored. A file may store a copy of the tied table all the same
(PyTorch's `.bin` files do); an equal copy is passed over. A head that differs from the table means that the
model was never tied, which is what stock classes make of such a file. Any other copy that differs is a model
that Lathe cannot hold (an encoder and a decoder with a table each), and an error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, blueprint, stored
from lathe.errors import RequestError
from lathe.families.base import Entry, Family

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """Where stored tensors are read from, one at a time."""

    def names(self) -> Iterable[str]:
        """Every stored name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, without reading it."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        ...


class Reader:
    """A family's file, read as Lathe's parameters.

    `architecture` is the one asked for, or its untied form where the file stores a head of its own.
    `left_out` lists stored tensors of other heads, which the config's class does not have.

    Raises:
        RequestError: a tensor too many, too few, or of another shape than the config says.
    """

    def __init__(self, family: Family, architecture: Architecture, source: Source) -> None:
        self._source = source
        self._prefix = family.prefix
        self._stored = {_current_name(name, family): name for name in source.names()}
        self.left_out: list[str] = []
        self.architecture = self._untie_if_stored_apart(family, architecture)
        self._shapes = {p.name: p for p in stored(self.architecture)}
        self._entries = {ours: entry for entry in family.entries(self.architecture) for ours in entry.ours}
        self._check(family)

    def names(self) -> Iterator[str]:
        """The names of Lathe's parameters, in the blueprint's order."""
        return iter(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """One of Lathe's parameters, read from the file."""
        entry = self._entries[name]
        whole = self._source.tensor(self._present(entry))
        whole = whole.reshape(-1) if entry.row else whole.t() if entry.transposed else whole
        sizes = [self._shapes[ours].shape[0] for ours in entry.ours]
        parts: tuple[Tensor, ...] = whole.split(sizes)
        return parts[entry.ours.index(name)].contiguous()

    def stored_as(self, name: str) -> tuple[str, bool]:
        """The tensor that holds a parameter, and whether it is that and nothing else, not transposed."""
        entry = self._entries[name]
        return self._present(entry), not entry.transposed and len(entry.ours) == 1

    def _find(self, name: str) -> str | None:
        """The stored name of a tensor, with or without the family's prefix."""
        bare = name.removeprefix(self._prefix)
        return next((self._stored[n] for n in (name, bare, self._prefix + bare) if n in self._stored), None)

    def _present(self, entry: Entry) -> str:
        found = self._all_present(entry)
        if found:
            return found[0]
        raise RequestError(f"the tensor {entry.theirs!r} is missing from the file; expected the config's whole model")

    def _all_present(self, entry: Entry) -> list[str]:
        """Every stored name of an entry's tensor, its own first."""
        return [found for name in entry.names if (found := self._find(name)) is not None]

    def _untie_if_stored_apart(self, family: Family, architecture: Architecture) -> Architecture:
        language = architecture.head.language
        if language is None or not language.tied:
            return architecture
        untied = architecture.with_(tied=False)
        head = next(e.theirs for e in family.entries(untied) if "head.language.output.weight" in e.ours)
        table = next(e for e in family.entries(architecture) if "embedding.tokens.weight" in e.ours)
        own, shared = self._find(head), self._all_present(table)
        if own is None or not shared or own in shared:
            return architecture
        return architecture if self._same(own, shared[0]) else untied

    def _same(self, one: str, other: str) -> bool:
        if self._source.shape(one) != self._source.shape(other):
            return False
        return bool((self._source.tensor(one) == self._source.tensor(other)).all())

    def _check(self, family: Family) -> None:
        entries = list(dict.fromkeys(self._entries.values()))
        missing = self._shapes.keys() - self._entries.keys()
        assert not missing, f"{family.name} declares no tensor for {sorted(missing)}"
        for entry in entries:
            found = self._source.shape(self._present(entry))
            expected = _disk_shape(entry, [self._shapes[ours] for ours in entry.ours])
            if found != expected:
                raise RequestError(
                    f"the tensor {self._present(entry)!r} is {_x(found)} and the config says {_x(expected)}; "
                    "the two belong to different models"
                )
            self._check_copies(entry)
        names = {name for entry in entries for name in entry.names}
        known = {self._find(name) for name in names | tied_names(family, self.architecture)}
        for name, on_disk in self._stored.items():
            if on_disk in known or _matches(name, family.ignored):
                continue
            if not _matches(name, family.other_heads):
                raise RequestError(
                    f"the tensor {on_disk!r} belongs to no parameter of this {family.name}; "
                    "expected only the config's model (is it of another depth?)"
                )
            self.left_out.append(on_disk)

    def _check_copies(self, entry: Entry) -> None:
        first, *others = self._all_present(entry)
        shadows = {self._find(name) for name in entry.shadows}
        for other in others:
            if other not in shadows and not self._same(first, other):
                raise RequestError(
                    f"the tensors {first!r} and {other!r} differ, and Lathe has one tensor for both; "
                    "expected a model in which they are equal"
                )


def to_disk(family: Family, architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...], Entry]]:
    """Name, shape and entry of every tensor of the family's file, in the family's order."""
    shapes = {p.name: p for p in stored(architecture)}
    for entry in family.entries(architecture):
        for name in entry.written:
            yield name, _disk_shape(entry, [shapes[ours] for ours in entry.ours]), entry


def fuse(entry: Entry, parts: list[Tensor]) -> Tensor:
    """The tensor on disk that holds `parts`, the entry's parameters in order."""
    import torch

    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    whole = whole[None] if entry.row else whole.t() if entry.transposed else whole
    return whole.contiguous()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _current_name(name: str, family: Family) -> str:
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def tied_names(family: Family, architecture: Architecture) -> set[str]:
    """Names under which a tied file may store the table once more: those of the output matrix."""
    if not any(p.tied_to for p in blueprint(architecture)):
        return set()
    untied = architecture.with_(tied=False)
    return {e.theirs for e in family.entries(untied) if "head.language.output.weight" in e.ours}


def _disk_shape(entry: Entry, parameters: list[Parameter]) -> tuple[int, ...]:
    first = parameters[0].shape
    shape = (sum(p.shape[0] for p in parameters), *first[1:])
    return (1, *shape) if entry.row else shape[::-1] if entry.transposed else shape


def _x(shape: tuple[int, ...]) -> str:
    return " × ".join(str(n) for n in shape) or "a single number"
