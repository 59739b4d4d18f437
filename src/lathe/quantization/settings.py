"""What a quantisation is asked, and which matrices it comes to."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, stored
from lathe.errors import RequestError
from lathe.spec import Spec

BITS = (8, 4)
GROUPS = (0, 32, 64, 128)
METHODS = ("nearest", "gptq")
ACTIVATIONS = ("int8", "none")

_END = ".weight"


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(Spec):
    """How a model is quantised.

    Args:
        bits: of the linear layers' codes: 8 or 4.
        activations: whether inputs are rounded too: `int8`, each token to its own scale, or `none`. `int8` where left
            out and codes have 8 bits and a scale a row; it needs that.
        group: weights of a row that share a scale: 32, 64, 128, or 0 for a row. 0 for 8 bits and 32 for 4 where left
            out. A layer whose inputs are no multiple of it has the next smaller group that fits.
        symmetric: whether codes have no zero point; with one, 4 bits are a little closer, and stock `transformers` does
            not open the files.
        method: `nearest`, or `gptq`, which needs text. `gptq` for 4 bits where there is text.
        tables: bits of the token table and the output matrix: 8 (a scale a row), 4 (in groups), or 16: left alone.
        keep: patterns of layers that are left alone, such as `decoder.attention.0.*`.
    """

    bits: int = 8
    activations: str | None = None
    group: int | None = None
    symmetric: bool = True
    method: str | None = None
    tables: int = 8
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        allowed = {
            "bits": (self.bits, BITS),
            "activations": (self.activations, (None, *ACTIVATIONS)),
            "group": (self.group, (None, *GROUPS)),
            "method": (self.method, (None, *METHODS)),
            "tables": (self.tables, (16, *BITS)),
        }
        for name, (value, wanted) in allowed.items():
            if value not in wanted:
                listed = ", ".join(str(each) for each in wanted if each is not None)
                raise RequestError(f"{name}={value}: expected one of {listed}")
        if self.activations == "int8" and (self.bits != 8 or self.group or not self.symmetric):
            raise RequestError(
                "activations=int8 multiplies whole numbers, which needs bits=8, a scale for each row (group=0) and "
                "symmetric codes; leave it out, or leave those out"
            )

    def settled(self, *, has_text: bool) -> QuantizeSettings:
        """The same with every choice made that was left out."""
        group = self.group if self.group is not None else (0 if self.bits == 8 else 32)
        whole = self.bits == 8 and group == 0 and self.symmetric
        activations = self.activations or ("int8" if whole else "none")
        method = self.method or ("gptq" if self.bits == 4 and has_text else "nearest")
        if method == "gptq" and not has_text:
            raise RequestError("method=gptq keeps what layers put out on text: give --calibrate FILE")
        return QuantizeSettings(
            bits=self.bits,
            activations=activations,
            group=group,
            symmetric=self.symmetric,
            method=method,
            tables=self.tables,
            keep=self.keep,
        )


@dataclass(frozen=True)
class Target:
    """One matrix that is quantised, and how.

    Args:
        name: of the matrix, such as `decoder.attention.0.q.weight`.
        group_size: weights of a row that share a scale; 0 where all do.
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool
    activations: str
    is_table: bool

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.name.removesuffix(_END)


def candidates(architecture: Architecture) -> list[Parameter]:
    """The matrices that can be quantised: linear layers and the token table, in the blueprint's order.

    Positions and token types are small, and what reads one state of a whole sequence (a pooler, a classifier) runs
    once for it: they are left as they are.
    """
    found: list[Parameter] = []
    for p in stored(architecture):
        if len(p.axes) != 2 or not p.name.endswith(_END):
            continue
        is_linear = p.role in ("reader", "writer") and {axis.name for axis in p.axes}.isdisjoint(("pooled", "labels"))
        if is_linear or (p.role == "table" and p.axes[0].name == "vocab"):
            found.append(p)
    return found


def choose_targets(architecture: Architecture, settings: QuantizeSettings) -> list[Target]:
    """What is quantised and how, by settled settings.

    Raises:
        RequestError: a pattern of `keep` that matches nothing, or nothing that is left.
    """
    found = candidates(architecture)
    kept = kept_by(settings.keep, [p.name.removesuffix(_END) for p in found])
    targets: list[Target] = []
    language = architecture.head.language
    for p in found:
        is_table = p.axes[0].name == "vocab"
        if p.name.removesuffix(_END) in kept or (is_table and settings.tables == 16):
            continue
        bits = settings.tables if is_table else settings.bits
        # A table has a scale for each token, or groups as the layers.
        asked = settings.group or 0
        if is_table:
            asked = 0 if bits == 8 else asked or 32
        symmetric = settings.symmetric or (is_table and bits == 8)
        multiplies = p.role != "table" or (language is not None and language.tied)
        rounds = settings.activations == "int8" and bits == 8 and multiplies
        targets.append(
            Target(p.name, bits, _fitting(asked, p.axes[1].size), symmetric, "int8" if rounds else "none", is_table)
        )
    if not targets:
        raise RequestError("nothing is left to quantise: keep fewer layers")
    return targets


def kept_by(patterns: Sequence[str], layers: Sequence[str]) -> set[str]:
    """The layers that any of the patterns matches: a layer's name, the beginning of one, or one with `*`.

    Raises:
        RequestError: a pattern that matches nothing.
    """
    kept: set[str] = set()
    for pattern in patterns:
        found = {
            name for name in layers if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('.')}.")
        }
        if not found:
            raise RequestError(
                f"keep={pattern!r} matches no layer that is quantised: expected a name such as {layers[-1]}, the "
                f"beginning of one, or a pattern such as *.{layers[-1].rpartition('.')[2]}"
            )
        kept |= found
    return kept


def _fitting(group: int, columns: int) -> int:
    """The group asked for, or the next smaller one that divides a row; 0 where none does."""
    return next((size for size in sorted(GROUPS, reverse=True) if size and size <= group and columns % size == 0), 0)
