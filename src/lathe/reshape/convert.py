"""The same model in another family's format: `family=electra`.

A family is a file format and changes no computation, so a conversion is a question: can that format hold the model?
Some formats want a little more than the model has, and what they want can be added without a change of any output:

- a bias, a constant of the head, token types: zeros;
- a matrix that lifts the embedding (ALBERT): the identity (`lathe.reshape.factorise`);
- a copy of what layers share, or of the table that a head shares;
- dropout probabilities, which count in training alone.

These are added by themselves. Everything else that a format wants otherwise is named and refused. BERT becomes ELECTRA
with `family=electra d_embed=128`, and that ALBERT with `family=albert sharing=all`: the family's part is exact, and
the steps beside it say what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families import objections
from lathe.reshape.operation import Operation, plain
from lathe.reshape.state import State, Step

# Fields that may turn from false to true: what appears starts at zero. The first name is a stack's.
_ADDED = ("attention.bias", "attention.output_bias", "feed_forward.bias")
_ADDED_TO_HEAD = ("head.language.bias", "head.language.offset", "head.classifier.bias")


def followers(target: Architecture) -> dict[str, Any]:
    """What the target's family wants added, where adding it changes no output.

    Raises:
        RequestError: where the family wants something else, with every field that it wants otherwise.
    """
    out: dict[str, Any] = {}
    wanted = objections(target)
    for path in _added(target):  # some families propose a relative of theirs rather than the bias that they miss
        if wanted and _value(target, path) is False:
            fewer = objections(target.with_(out | {path: True}))
            if len(fewer) < len(wanted):
                out[path], wanted = True, fewer
    while wanted:
        refused = [each for each in wanted if not _is_free(target.with_(out), each.changes)]
        if refused:
            reasons = "; ".join(each.reason for each in refused)
            raise RequestError(f"family={target.family}: this model does not fit its files: {reasons}")
        for each in wanted:
            out |= each.changes
        wanted = objections(target.with_(out))
    return out


def _is_free(architecture: Architecture, changes: Mapping[str, Any]) -> bool:
    """Whether all of these changes leave every output as it was."""
    return bool(changes) and all(
        _is_free_field(architecture, path, value)
        for name, value in changes.items()
        for path in architecture.paths(name)
    )


def _is_free_field(architecture: Architecture, path: str, value: Any) -> bool:
    stack, _, rest = path.partition(".")
    if stack == "dropout" or _value(architecture, path) == value:
        return True
    if path in _added(architecture) or path == "embedding.projection_bias":
        return value is True
    if path == "embedding.token_types":
        return architecture.embedding.token_types == 0
    if path == "embedding.d_embed":
        return architecture.embedding.d_embed is None and value == architecture.d_model
    if path == "head.language.tied":
        return value is False
    return rest == "sharing" and str(value) == "none"


def _added(architecture: Architecture) -> list[str]:
    return [f"{name}.{field}" for name, _ in architecture.stacks for field in _ADDED] + list(_ADDED_TO_HEAD)


def plan_family(done: Architecture, target: Architecture) -> list[Operation]:
    """The zeros that are added, the dropouts that change, and the name; one operation for each."""
    operations = []
    changes: dict[str, Any] = {
        path: True for path in _added(done) if _value(done, path) is False and _value(target, path) is True
    }
    if not done.embedding.token_types and target.embedding.token_types:
        changes["embedding.token_types"] = target.embedding.token_types
    if changes:
        operations.append(Operation(changes, plain(add_zeros, changes)))
    if done.dropout != target.dropout:
        operations.append(
            Operation({"dropout": target.dropout}, plain(_relabel, {"dropout": target.dropout}, "dropout"))
        )
    if done.family != target.family:
        name = f"family {done.family or 'none'} → {target.family or 'none'}"
        operations.append(Operation({"family": target.family}, plain(_relabel, {"family": target.family}, name)))
    return operations


def _value(architecture: Architecture, path: str) -> Any:
    """The field, or None where a part on the way is missing."""
    value: Any = architecture
    for key in path.split("."):
        value = getattr(value, key, None)
    return value


def add_zeros(state: State, changes: dict[str, Any]) -> tuple[State, Step]:
    """The state with fields that only add tensors, all of them zero. Exact."""
    grown = State(state.architecture.with_(changes), state.tensors)
    zeros = {
        p.name: torch.zeros(p.shape, dtype=torch.float64) for p in grown.parameters() if p.name not in state.tensors
    }
    return grown.with_(zeros), Step(f"add zeros: {', '.join(changes)}", True, {})


def _relabel(state: State, changes: dict[str, Any], name: str) -> tuple[State, Step]:
    return state.with_({}, changes), Step(name, True, {})
