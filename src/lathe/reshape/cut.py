"""Operations that make an axis narrower: heads by their products' rank, widths by rotation or by choosing channels.

Which channels, and what text is needed for that, is the method's to say; `lathe.reshape.width` has the mathematics.
What is left is then fitted to its parent, whatever the method (`lathe.reshape.refit`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.reshape.calibrate import Moments, moments, unit
from lathe.reshape.fold import is_tied
from lathe.reshape.heads import narrow_heads
from lathe.reshape.operation import Context, Operation, Run, by_stack, plain
from lathe.reshape.refit import refit
from lathe.reshape.search import HELD_EVERY, UNSOUGHT, Sought, rows_for, search, steps_within, worth
from lathe.reshape.sensitivity import rows_kept, sensitivity
from lathe.reshape.state import State, Step, multiply
from lathe.reshape.stream import model_of
from lathe.reshape.transform import loudest_directions, onto_table, refit_transform, transform_rows
from lathe.reshape.width import Basis, is_centred, keep, norms_of, principal, rotate, streams_of, with_stored_positions

_ENERGY = "share of the energy that each norm hands on which stays"
_UNREAD = f"{UNSOUGHT}: that takes norms whose output goes to readers alone"
_TOO_LONG = f"{UNSOUGHT}: that would take hours, and search=20 makes twenty steps all the same"
_TOKENS = "embedding.tokens.weight"
_OUTPUT = "head.language.output.weight"


def plan_heads(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack whose heads become narrower."""
    return by_stack(done, target, "attention.d_head", partial(plain, narrow_heads), grows=False)


def plan_width(
    done: Architecture, target: Architecture, method: str, *, refitted: bool | None = None, search: int | None = None
) -> list[Operation]:
    """An operation for each width that becomes smaller.

    Args:
        search: how many steps a rotation's basis is looked for; None: as many as the model's size allows, or none where
            nothing is fitted afterwards, which the search counts on.
        refitted: whether the rest of the model is fitted to its parent afterwards (`lathe.reshape.refit`); None: where
            the method reads text anyway.

    Raises:
        RequestError: an embedding's own width that is to grow.
    """
    operations = []
    fits = method != "truncate" if refitted is None else refitted
    steps = 0 if search is None and not fits else search
    for field, group, old, wanted in (
        ("d_model", "residual", done.d_model, target.d_model),
        ("embedding.d_embed", "embed", done.embedding.d_embed, target.embedding.d_embed),
    ):
        if old is None or wanted is None or wanted == old:
            continue
        if wanted < old:
            operations.append(Operation({field: wanted}, _cutting(field, group, wanted, method, fits, steps)))
        elif group == "embed":
            raise RequestError(f"d_embed={wanted}: this model has {old}, and it can only be cut; give a smaller number")
    return operations


def _cutting(field: str, group: str, size: int, method: str, fits: bool, steps: int | None) -> Run:
    def run(context: Context, state: State) -> tuple[State, list[Step]]:
        if method == "truncate" and not fits:
            return _kept(state, group, field, torch.arange(size), method)
        state = with_stored_positions(state, group)
        model, batches = context.current(state), context.batches
        norms = _sites(state.architecture, group)
        seen = moments(model, batches, norms, streams=streams_of(state.architecture, group))
        _require_enough(seen, field, size)
        channels: Tensor | None = None
        if method == "rotate":
            started, done, into = _rotated(context, state, group, field, size, seen, steps)
        else:
            channels = torch.arange(size)
            if method == "select":
                channels = seen.loudness(norms).topk(size).indices.sort().values
            started, done = _kept(state, group, field, channels, method)
            done = [replace(done[0], detail=_energy(seen, norms, channels), measures=_ENERGY)]
            into = torch.eye(len(seen.mean(norms[0])), dtype=torch.float64)[:, channels]
        if not fits:
            return started, done
        fitted, more = refit(state, started, into, batches, embed=group == "embed", pooled=channels)
        return fitted, [*done, *more]

    return run


def _energy(seen: Moments, norms: list[str], channels: Tensor) -> dict[str, float]:
    return {norm: float(seen.loud[norm][channels].sum() / seen.loud[norm].sum()) for norm in norms}


def _sites(architecture: Architecture, group: str) -> list[str]:
    """Where the axis is looked at: its norms, or the matrix that reads a factorised table that has none."""
    return norms_of(architecture, group) or ["embedding.projection"]


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


def _rotated(
    context: Context, state: State, group: str, field: str, size: int, seen: Moments, steps: int | None
) -> tuple[State, list[Step], Tensor]:
    """The rotated state, what was done, and the basis."""
    norms = _sites(state.architecture, group)
    centred = is_centred(state.architecture, group)
    language = state.architecture.head.language
    if language is None or language.transform is None or not _head_is_as_wide(state.architecture, group):
        basis, note = _basis(context, state, group, size, seen, steps)
        rotated, step = rotate(state, group, field, basis, seen)
        return rotated, [replace(step, note=note)], basis.matrix
    # The head writes what the table reads, so its output has a say in which channels stay.
    x_ND, old_NE = transform_rows(context.current(state), context.batches)
    seen.add("head.language.norm", unit(old_NE, centred=centred))
    basis = principal(seen, [*norms, "head.language.norm"], size, centred=centred)
    rotated, step = rotate(state, group, field, basis, seen)
    step = replace(step, note=_UNREAD if steps else "")
    if step.exact:  # the channels are what they were, and so is what the transform gives
        return rotated, [step], basis.matrix
    if group == "residual":
        x_ND, _ = transform_rows(context.current(rotated), context.batches)
    if language.tied:
        onto = onto_table(rotated.tensors[_TOKENS], state.tensors[_TOKENS])
    else:  # a table of its own needs not the stream's channels, but the transform's best ones
        onto = loudest_directions(old_NE, size).T
        rotated = rotated.with_({_OUTPUT: multiply(state.tensors[_OUTPUT], 1, onto.T)})
    refitted, second = refit_transform(state, rotated, x_ND, old_NE, onto.T)
    return refitted, [step, second], basis.matrix


def _basis(
    context: Context, state: State, group: str, size: int, seen: Moments, steps: int | None
) -> tuple[Basis, str]:
    """The directions that stay, and a sentence on how they were found.

    They are looked for (`lathe.reshape.search`) where what the norms hand on goes to readers alone. Elsewhere, and with
    no steps asked for, they are the principal ones. Where there is no time for a step, or too little text to judge one
    by, they are those with each norm's share weighted by what an error there costs.
    """
    norms, centred = _sites(state.architecture, group), is_centred(state.architecture, group)
    is_read = group == "residual" and not streams_of(state.architecture, group)
    if not is_read or steps == 0 or size == state.architecture.d_model:
        return principal(seen, norms, size, centred=centred), _UNREAD if steps and not is_read else ""
    model = context.current(state)
    if model.dtype not in (torch.float32, torch.float64):  # gradients need more digits
        model = model_of(state, torch.float32, model.device)
    tokens, least = {norm: seen.tokens[norm] for norm in norms}, rows_for(size)
    rows, fewest = sum(rows_kept(count, least) for count in tokens.values()), min(tokens.values())
    why = ""
    if steps is None:
        steps = steps_within(rows, state.architecture.d_model, size)
        why = "" if steps else _TOO_LONG
    if fewest < HELD_EVERY:  # nothing could be held out
        steps, why = 0, f"{UNSOUGHT}: a norm saw {fewest} tokens, and it takes {HELD_EVERY}; give more text"
    # Labels are drawn apart from what growth draws, so that new weights do not depend on whether a basis is looked for.
    labels = torch.Generator().manual_seed(context.generator.initial_seed())
    felt = sensitivity(model, context.batches, tokens, least_rows=least if steps else 0, generator=labels)
    sought = Sought(
        felt,
        {norm: state.wide(f"{norm}.weight") for norm in norms},
        shifted=frozenset(norm for norm in norms if f"{norm}.bias" in state.tensors),
        tied=frozenset(norm for norm in norms if is_tied(state.architecture, norm)),
    )
    start = principal(seen, norms, size, centred=centred, weights=worth(sought, seen))
    if not steps:
        return start, why
    found = search(start, sought, seen, steps)
    return found.basis, found.note


def _head_is_as_wide(architecture: Architecture, group: str) -> bool:
    """Whether the axis is the one that the token table, and so the head, is written in."""
    return group == ("residual" if architecture.embedding.d_embed is None else "embed")
