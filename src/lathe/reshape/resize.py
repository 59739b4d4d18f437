"""Turn the sizes that were asked for into operations, and carry them out one after the other.

Each field that changes belongs to one operation. What a change drags along is added first, by one rule: where a
stack's heads filled the width exactly and the model's family insists on that, they still do, at another `d_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families import objections
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch, Moments, moments, unit
from lathe.reshape.heads import narrow_heads
from lathe.reshape.state import State, Step
from lathe.reshape.transform import refit_transform, transform_rows
from lathe.reshape.width import is_centred, keep, norms_of, principal, rotate

METHODS = ("rotate", "select", "truncate")


@dataclass(frozen=True)
class Resized:
    """A reshaped model's architecture and tensors, and what was done to get there."""

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    steps: tuple[Step, ...]


def resize(
    model: Transformer,
    changes: Mapping[str, Any],
    *,
    calibrate: Sequence[Batch] = (),
    method: str = "rotate",
) -> Resized:
    """Other sizes for a trained model.

    Args:
        changes: fields of the architecture to their new values, as `Architecture.with_` takes them.
        calibrate: batches of keyword arguments of the model, of the kind of text that it is used on;
            `truncate` needs none.
        method: how a width is cut: `rotate`, `select` or `truncate`.

    Raises:
        RequestError: a change that cannot be made, an unknown method, or no calibration text where it is needed.
    """
    if method not in METHODS:
        raise RequestError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    source = model.architecture
    target = source.with_(with_followers(source, changes))
    state = State(source, model.state_dict())
    steps: list[Step] = []
    for operation in _operations(source, target, method):
        state, done = operation(model, state, calibrate)
        steps.extend(done)
    return _finished(state, target, model.dtype, steps)


def with_followers(source: Architecture, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes and what they drag along, where the family could not hold the result without it.

    Raises:
        RequestError: where no whole number of channels per head fills the width.
    """
    target = source.with_(changes)
    out = dict(changes)
    if not objections(target):
        return out
    for name, stack in source.stacks:
        new = dict(target.stacks)[name].attention
        filled = stack.attention.d_q == source.d_model
        if not filled or new.d_q == target.d_model or new != stack.attention:
            continue
        if stack.positions.kind == "rotary":
            continue
        if target.d_model % new.n_heads:
            raise RequestError(
                f"d_model={target.d_model}: {name} has {new.n_heads} heads that fill the width, and they cannot fill "
                f"this one; choose a multiple of {new.n_heads}, or give {name}.attention.n_heads too"
            )
        out[f"{name}.attention.d_head"] = target.d_model // new.n_heads
    return out


Operation = Callable[[Transformer, State, Sequence[Batch]], tuple[State, list[Step]]]


def _operations(source: Architecture, target: Architecture, method: str) -> list[Operation]:
    """What has to be done, in order; a change that nothing does is an error."""
    operations: list[Operation] = []
    done = source
    for name, stack in source.stacks:
        new = dict(target.stacks)[name].attention.d_head
        if new != stack.attention.d_head:
            operations.append(_narrowing(name, new))
            done = done.with_({f"{name}.attention.d_head": new})
    for field, group, old, wanted in (
        ("d_model", "residual", source.d_model, target.d_model),
        ("embedding.d_embed", "embed", source.embedding.d_embed, target.embedding.d_embed),
    ):
        if wanted == old or old is None or wanted is None:
            continue
        if wanted > old:
            raise RequestError(f"{field}={wanted}: this model has {old}, and it can only be cut; give a smaller number")
        operations.append(_cutting(field, group, wanted, method))
        done = done.with_({field: wanted})
    if done != target:
        names = ", ".join(_differences(done.to_dict(), target.to_dict()))
        raise RequestError(f"cannot change {names} of a trained model; resize changes d_model, d_embed and d_head")
    return operations


def _narrowing(stack: str, d_head: int) -> Operation:
    def run(_: Transformer, state: State, __: Sequence[Batch]) -> tuple[State, list[Step]]:
        state, step = narrow_heads(state, stack, d_head)
        return state, [step]

    return run


def _cutting(field: str, group: str, size: int, method: str) -> Operation:
    def run(model: Transformer, state: State, batches: Sequence[Batch]) -> tuple[State, list[Step]]:
        if method == "truncate":
            return _kept(state, group, field, torch.arange(size), method)
        norms = norms_of(state.architecture, group)
        seen = moments(model, batches, norms)
        if method == "select":
            return _kept(state, group, field, _most_active(state, norms, seen, size), method)
        _require_pre_norm(state.architecture, group)
        return _rotated(model, state, group, field, size, seen, batches)

    return run


def _kept(state: State, group: str, field: str, channels: Tensor, method: str) -> tuple[State, list[Step]]:
    kept, step = keep(state, group, field, channels, method)
    if group == "residual":  # what is as wide as the stream by definition is cut alongside
        for follower in ("pooled", "transform"):
            kept, _ = keep(kept, follower, field, channels, method)
    return kept, [step]


def _most_active(state: State, norms: list[str], seen: Moments, size: int) -> Tensor:
    """The channels that carry most of what the norms hand to their readers, in their old order."""
    score = torch.zeros_like(seen.mean(norms[0]).diagonal())
    for norm in norms:
        score += state.wide(f"{norm}.weight").square() * seen.mean(norm).diagonal()
        if f"{norm}.bias" in state.tensors:
            score += state.wide(f"{norm}.bias").square()
    return score.topk(size).indices.sort().values


def _require_pre_norm(architecture: Architecture, group: str) -> None:
    for name, stack in architecture.stacks:
        if group == "residual" and (stack.norm_position == "post" or stack.input_norm):
            raise RequestError(
                f"the {name} norms the stream itself (post-norm), which no single rotation passes; use method=select"
            )


def _rotated(
    model: Transformer, state: State, group: str, field: str, size: int, seen: Moments, batches: Sequence[Batch]
) -> tuple[State, list[Step]]:
    norms = norms_of(state.architecture, group)
    centred = is_centred(state.architecture, group)
    language = state.architecture.head.language
    if language is None or language.transform is None or not _head_is_as_wide(state.architecture, group):
        rotated, step = rotate(state, group, field, principal(seen, norms, size, centred=centred), seen)
        return rotated, [step]
    # The head writes what the table reads, so its output has a say in which channels stay.
    x_ND, old_NE = transform_rows(model, batches)
    seen.add("head.language.norm", unit(old_NE, centred=centred))
    basis = principal(seen, [*norms, "head.language.norm"], size, centred=centred)
    rotated, step = rotate(state, group, field, basis, seen)
    refitted, second = refit_transform(state, rotated, x_ND, old_NE, basis.writing)
    return refitted, [step, second]


def _head_is_as_wide(architecture: Architecture, group: str) -> bool:
    """Whether the axis is the one that the token table, and so the head, is written in."""
    return group == ("residual" if architecture.embedding.d_embed is None else "embed")


def _finished(state: State, target: Architecture, dtype: torch.dtype, steps: list[Step]) -> Resized:
    if state.architecture.d_model != target.d_model:
        raise AssertionError(f"reshaping ended at {state.architecture.d_model}, not at {target.d_model}")
    cast = state.cast(dtype)
    return Resized(cast.architecture, cast.tensors, tuple(steps))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    out: list[str] = []
    for key, value in one.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and isinstance(other[key], dict):
            out += _differences(value, other[key], here)
        elif value != other[key]:
            out.append(here)
    return out
