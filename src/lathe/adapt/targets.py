"""Which linear layers an adapter is put on: chosen from the blueprint, by role, by axis or by name.

A reader takes the residual stream and yields an axis (q yields `heads`, up yields `ffn`); a writer takes such an
axis back to the stream (o, down). So `heads` is q and o, `reader:heads` is q, `writer:ffn` is down.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, stored
from lathe.errors import RequestError
from lathe.families import holder

ALL = "all-linear"
_ROLES = ("reader", "writer")
_END = ".weight"


def linear_layers(architecture: Architecture) -> dict[str, Parameter]:
    """Every linear layer's name and its matrix; tables and tied outputs are none."""
    return {
        p.name.removesuffix(_END): p
        for p in stored(architecture)
        if p.role in _ROLES and len(p.axes) == 2 and p.name.endswith(_END)
    }


@dataclass(frozen=True)
class StockModule:
    """A stock linear module and the layers of ours whose outputs it holds, one after another.

    Args:
        transposed: whether it keeps its weight `in × out`, which PEFT wants to be told.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def stock_modules(architecture: Architecture) -> list[StockModule]:
    """Every linear module of the stock model; Lathe's own where no family can hold the architecture."""
    layers, source = linear_layers(architecture), holder(architecture)
    if source is None:
        return [StockModule(name, (name,)) for name in layers]
    found = []
    for entry in source.entries(architecture):
        ours = tuple(name.removesuffix(".weight") for name in entry.ours)
        if all(name.endswith(".weight") for name in entry.ours) and all(name in layers for name in ours):
            found.append(StockModule(entry.theirs.removesuffix(".weight"), ours, entry.transposed))
    return found


def choose(architecture: Architecture, terms: list[str], *, setting: str = "targets") -> list[str]:
    """The names of the layers that any of the terms matches, in the blueprint's order.

    Args:
        setting: where the terms come from, for the error's sake.

    Raises:
        RequestError: a term that is no role, axis or pattern, or that matches no layer.
    """
    layers = linear_layers(architecture)
    chosen: set[str] = set()
    for term in terms:
        found = _matching(term, layers)
        if not found:
            raise RequestError(
                f"{setting}={term!r} matches no linear layer: expected {ALL}, {_axes(layers)}, reader:AXIS, "
                f"writer:AXIS, or a pattern of names such as {_example(layers)}"
            )
        chosen |= found
    return [name for name in layers if name in chosen]


def _matching(term: str, layers: dict[str, Parameter]) -> set[str]:
    if "*" in term or "." in term:
        return {name for name in layers if fnmatch.fnmatchcase(name, term)}
    body = {name: p for name, p in layers.items() if p.component != "head"}
    if term == ALL:
        return set(body)
    role, _, axis = term.rpartition(":")
    if term in _ROLES:
        role, axis = term, ""
    return {
        name
        for name, p in body.items()
        if role in ("", p.role) and (not axis or axis in (each.name for each in p.axes))
    }


def _axes(layers: dict[str, Parameter]) -> str:
    names = [axis.name for p in layers.values() if p.component != "head" for axis in p.axes]
    return ", ".join(dict.fromkeys((*_ROLES, *names)))


def _example(layers: dict[str, Parameter]) -> str:
    first = next(name for name in layers if name.endswith(".q"))
    return f"*.attention.*.q (a layer's name is {first})"
