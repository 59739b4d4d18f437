"""Export a model: refuse what the format cannot hold, write, run what was written, and only then put it in its place.

Everything happens in a temporary beside the destination (`lathe.checkpoint.atomic`), so a file that its own program
cannot open, or that computes something else, never stands there. Where that program is not installed the file is
written all the same, and the report says that nobody ran it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lathe.adapt import folded_tensors
from lathe.architecture import Architecture, Pooler
from lathe.blueprint import stored
from lathe.checkpoint.atomic import atomic_directory, atomic_file
from lathe.errors import LatheError, RequestError
from lathe.export.base import Checked, Format, Kind, Source
from lathe.export.formats import format_of, missing, pip_line

if TYPE_CHECKING:
    from lathe.model.transformer import Transformer
    from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        notes: what its user has to know: what the program leaves out or computes a little differently.
        checked: how it ran in its own program; None where that is not installed, which `unchecked` then says.
    """

    path: Path
    to: str
    kind: str
    nbytes: int
    notes: tuple[str, ...]
    checked: Checked | None
    unchecked: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "format": self.to,
            "type": self.kind,
            "bytes": self.nbytes,
            "notes": list(self.notes),
            "verified": None if self.checked is None else self.checked.to_dict(),
            "not_verified_because": self.unchecked,
        }


def export(
    model: Transformer,
    path: str | Path,
    *,
    to: str,
    kind: str | None = None,
    body: bool = False,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
) -> Exported:
    """Write a model as a file of another program, and run it there.

    Args:
        model: the model; an active adapter is folded in, and codes of a quantised one are made numbers first.
        path: where it goes: a file for gguf, a directory for ctranslate2 and onnx. It must not exist.
        to: gguf, ctranslate2 or onnx.
        kind: the type of the weights, of those that the format has; its first where left out.
        body: leave the token head and the classifier out, for programs that want the states alone.
        tokenizer: written as well, in the format's own way.
        name: what the file calls the model; the path's last part where left out.

    Raises:
        RequestError: an unknown format or type, an architecture that the format cannot hold, a package that writing
            it takes and that is not installed, a path that exists.
        LatheError: the program cannot open what was written, or computes something else; the disk is full. Nothing
            is left behind.
    """
    require_ready(path, to, kind)
    target, form = Path(path).expanduser(), format_of(to)
    chosen = form.kind(kind)
    architecture = without_heads(model.architecture) if body else model.architecture
    reasons = form.objections(architecture)
    if reasons:
        raise RequestError(f"{form.name} cannot hold this model: {'; '.join(reasons)}")
    source = _source(model, architecture, tokenizer, name or target.stem)
    absent = missing(form.runtime)
    least = int(sum(tensor.numel() for tensor in source.tensors.values()) * chosen.bits / 8)
    with _place(target, form, least) as place:
        notes = form.write(source, chosen, place)
        checked = None if absent else _checked(form, source, chosen, place)
        nbytes = sum(
            file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()
        )
    unchecked = f"{form.program} is not installed: {pip_line(absent)}" if absent else None
    notes.extend(checked.notes if checked is not None else ())
    return Exported(target, form.name, chosen.name, nbytes, tuple(notes), checked, unchecked)


def without_heads(architecture: Architecture) -> Architecture:
    """The architecture without token head and classifier; a pooled state that a classifier alone reads goes as well.

    Raises:
        RequestError: there is no head to leave out.
    """
    head = architecture.head
    if head.language is None and head.classifier is None:
        raise RequestError("body leaves the token head and the classifier out, and this model has neither; drop it")
    # This one belongs to a bare BERT as well; any other is a part of its classifier.
    pooler = head.pooler if head.pooler == Pooler(token="first", activation="tanh") else None
    return architecture.with_({"head.language": None, "head.classifier": None, "head.pooler": pooler})


def require_ready(path: str | Path, to: str, kind: str | None) -> None:
    """Refuse, before a model is loaded, what would be refused whatever it is.

    Raises:
        RequestError: an unknown format or type, a path that exists or is named wrongly, a package that is missing.
    """
    target, form = Path(path).expanduser(), format_of(to)
    form.kind(kind)
    if form.suffix and target.suffix != form.suffix:
        raise RequestError(f"{target}: expected a name that ends in {form.suffix} for a {form.name} file")
    if target.is_dir() if not form.directory else target.is_file():
        what = "a file, where a directory" if form.directory else "a directory, where a file"
        raise RequestError(f"{target} is {what} is to be written: choose another name")
    if target.exists() and (not form.directory or any(target.iterdir())):
        raise RequestError(f"{target} already exists: choose another name, or remove it")
    absent = missing(form.writer)
    if absent:
        raise RequestError(f"writing {form.name} takes what is not installed: {pip_line(absent)}")


def _source(model: Transformer, architecture: Architecture, tokenizer: Tokenizer | None, name: str) -> Source:
    ours = folded_tensors(model)
    tensors = {p.name: ours[p.name].to("cpu", torch.float32).contiguous() for p in stored(architecture)}
    return Source(architecture, tensors, tokenizer, name)


@contextmanager
def _place(target: Path, form: Format, nbytes: int) -> Iterator[Path]:
    made = atomic_directory(target, nbytes=nbytes) if form.directory else atomic_file(target, nbytes=nbytes)
    with made as place:
        yield place


def _checked(form: Format, source: Source, kind: Kind, place: Path) -> Checked:
    checked = form.check(source, kind, place)
    if checked.error > kind.limit:
        raise LatheError(
            f"{checked.runtime} computes other {checked.what} than the model: the difference is {checked.error:.2g} of "
            f"their spread, and {kind.limit:.2g} is what {kind.name} may cost; nothing was written"
        )
    return checked
