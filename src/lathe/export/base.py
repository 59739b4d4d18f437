"""What a format says about itself, and what is known of a file once it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.architecture import Architecture
from lathe.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from lathe.export.compare import Difference
    from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """The model that is exported.

    Args:
        architecture: its sizes and choices.
        tensors: the blueprint's names to float32 tensors on the CPU.
        tokenizer: None where the model has none.
        name: what the file calls it.
    """

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    name: str


@dataclass(frozen=True)
class Kind:
    """A type that a format can store weights in.

    Args:
        bits: how many a weight takes, scales included.
        limit: how far the outputs may be from the model's, as a share of their own spread (`compare.Difference`).
            Tensors at a wrong place, or a wrong activation, are beyond every limit here.
    """

    name: str
    bits: float
    limit: float


@dataclass(frozen=True)
class Package:
    """A Python package that a format needs: the module it is imported by, and the name that pip knows."""

    module: str
    pip: str


@dataclass(frozen=True)
class Checked:
    """A file that was run.

    Args:
        runtime: the program and its version.
        what: what was compared: "logits", "hidden states", ….
        difference: how far the file's outputs are from the model's.
        running: how far they are from those of the model with the weights as the file's type holds them, which is the
            program's own part; None where that is not told apart.
        texts: how many texts its tokenizer cut into the same ids; None where the file holds no tokenizer of its own.
        notes: what was found that its user has to know.
    """

    runtime: str
    what: str
    difference: Difference
    running: Difference | None = None
    texts: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The relative error that the type's limit is for."""
        return (self.running or self.difference).relative_error

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runtime": self.runtime,
            "what": self.what,
            "texts_tokenised_alike": self.texts,
            **asdict(self.difference),
            "relative_error_of_running": None if self.running is None else self.running.relative_error,
        }


@dataclass(frozen=True)
class Format:
    """A program's file format.

    Args:
        name: what `--to` calls it.
        program: whose format it is, for people.
        kinds: the types that weights can be stored in, the default first.
        directory: whether it is a directory or one file.
        suffix: how a file's name ends.
        writer, runtime: the packages that writing it takes, and running it.
        objections: why the format cannot hold an architecture, one clause each; nothing where it can.
        write: `(source, kind, place) -> notes`: writes the file, or into the directory, and says what its user has
            to know.
        check: `(source, kind, place) -> Checked`: runs what was written.
    """

    name: str
    program: str
    kinds: tuple[Kind, ...]
    directory: bool
    suffix: str
    writer: tuple[Package, ...]
    runtime: tuple[Package, ...]
    objections: Callable[[Architecture], list[str]]
    write: Callable[[Source, Kind, Path], list[str]]
    check: Callable[[Source, Kind, Path], Checked]

    def kind(self, name: str | None) -> Kind:
        """The type of that name, or the default; an unknown one is a `RequestError` that names those there are."""
        if name is None:
            return self.kinds[0]
        found = next((kind for kind in self.kinds if kind.name == name), None)
        if found is None:
            names = ", ".join(kind.name for kind in self.kinds)
            raise RequestError(f"type={name!r}: {self.name} stores weights as one of {names}")
        return found
