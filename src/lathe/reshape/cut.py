"""Operations that make an axis narrower: heads by their products' rank, widths by rotation or by choosing channels.

Which channels, and what text is needed for that, is the method's to say; `lathe.reshape.width` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch, Moments, moments, unit
from lathe.reshape.heads import narrow_heads
from lathe.reshape.operation import Context, Operation, Run, plain
from lathe.reshape.postnorm import rotate_post_norm
from lathe.reshape.state import State, Step
from lathe.reshape.transform import refit_transform, transform_rows
from lathe.reshape.width import is_centred, keep, norms_of, principal, rotate


def plan_heads(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack whose heads become narrower."""
    operations = []
    for name, stack in done.stacks:
        wanted = dict(target.stacks)[name].attention.d_head
        if wanted < stack.attention.d_head:
            run = plain(narrow_heads, name, wanted)
            operations.append(Operation({f"{name}.attention.d_head": wanted}, run))
    return operations


def plan_width(done: Architecture, target: Architecture, method: str) -> list[Operation]:
    """An operation for each width that becomes smaller.

    Raises:
        RequestError: an embedding's own width that is to grow.
    """
    operations = []
    for field, group, old, wanted in (
        ("d_model", "residual", done.d_model, target.d_model),
        ("embedding.d_embed", "embed", done.embedding.d_embed, target.embedding.d_embed),
    ):
        if old is None or wanted is None or wanted == old:
            continue
        if wanted < old:
            operations.append(Operation({field: wanted}, _cutting(field, group, wanted, method)))
        elif group == "embed":
            raise RequestError(f"d_embed={wanted}: this model has {old}, and it can only be cut; give a smaller number")
    return operations


def _cutting(field: str, group: str, size: int, method: str) -> Run:
    def run(context: Context, state: State) -> tuple[State, list[Step]]:
        if method == "truncate":
            return _kept(state, group, field, torch.arange(size), method)
        model, batches = context.current(state), context.batches
        norms = norms_of(state.architecture, group)
        seen = moments(model, batches, norms)
        _require_enough(seen, field, size)
        if method == "select":
            return _kept(state, group, field, _most_active(state, norms, seen, size), method)
        if group == "residual" and any(stack.norm_position == "post" for _, stack in state.architecture.stacks):
            _require_all_post_norm(state.architecture)
            return rotate_post_norm(state, batches, size)
        _require_unnormed_input(state.architecture, group)
        return _rotated(model, state, group, field, size, seen, batches)

    return run


def _require_enough(seen: Moments, field: str, size: int) -> None:
    """Refuse text with fewer tokens than directions to choose: it cannot tell them apart."""
    tokens = max(seen.tokens.values())
    if tokens < size:
        raise RequestError(
            f"the calibration text has {tokens} tokens, and {field.removeprefix('embedding.')}={size} needs at least "
            f"as many; give {10 * size} or more"
        )


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


def _require_all_post_norm(architecture: Architecture) -> None:
    if any(stack.norm_position == "pre" for _, stack in architecture.stacks):
        raise RequestError("one stack norms before its sublayers, one after, so no one fit serves; use method=select")


def _require_unnormed_input(architecture: Architecture, group: str) -> None:
    for name, stack in architecture.stacks:
        if group == "residual" and stack.input_norm:
            raise RequestError(
                f"the {name} norms its embeddings with a scale of its own, which no rotation passes; use method=select"
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
