"""Another width for one axis group of a trained model: rotate, select or truncate its channels.

`rotate` (SliceGPT, Ashkboos et al. 2024, §3, with one basis for the whole model so that the result stays a
stock architecture). Every norm's scale is folded into its readers; then the stream may be written in any
orthonormal basis. P holds the d' directions in which the unit-normalised stream moves most, summed over
all norms. Tables and writers become `W P`-sided, readers `W P`, and norms get weight √(d/d') and eps·d/d',
because RMSNorm divides by √d and the new stream has d' channels. At d' = d this changes nothing.

LayerNorm removes the mean as well. With M = I − 11ᵀ/d, take the d'−1 best directions of the centred stream
and write them in a basis V of d' channels that has no mean itself (Vᵀ1 = 0), and the mean in the mean:
R = P Vᵀ + 11ᵀ/√(dd'). What a LayerNorm removed before, it removes after.

The kept directions may be turned among themselves. They are turned so that the channels stay as near as they can to
those that carry most, because some norms keep a weight, which works channel by channel: where a norm's output is the
stream itself (post-norm, a norm on the embeddings), no reader can take its weight in. There the rotation is only a
start, and `lathe.reshape.refit` does the rest.

A tied token table reads the final norm's output and also writes the stream, so that norm keeps a scale: the
diagonal that loses least on the calibration text, found by least squares.

`select` keeps channels as they are and `truncate` the first ones; both only slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, blueprint
from lathe.errors import RequestError
from lathe.model.positions import sinusoid
from lathe.reshape.calibrate import Moments
from lathe.reshape.fold import fold, is_tied, readers
from lathe.reshape.state import State, Step, blocks, multiply


@dataclass(frozen=True)
class Basis:
    """The new channels in terms of the old ones.

    Args:
        matrix: R, old × new.
        centred: whether the axis' norms remove the mean; R then takes a mean to the mean.
        energy: the share of the stream's second moment that survives, by norm.
    """

    matrix: Tensor
    centred: bool
    energy: dict[str, float]

    @property
    def growth(self) -> float:
        """√(d/d'), by which the norms' weights make up for the channels that are gone."""
        return math.sqrt(self.matrix.shape[0] / self.matrix.shape[1])

    @property
    def writing(self) -> Tensor:
        """R without what it makes of the mean, where the norms remove it anyway."""
        return self.matrix - self.matrix.mean(0, keepdim=True) if self.centred else self.matrix


def is_centred(architecture: Architecture, group: str) -> bool:
    """Whether the norms along `group` remove the mean; False where there are none.

    Raises:
        RequestError: where one stack's norms do and the other's do not: one basis cannot serve both.
    """
    if not norms_of(architecture, group):
        return False
    kinds = {stack.norm.kind for _, stack in architecture.stacks}
    if len(kinds) > 1:
        raise RequestError(
            "the encoder and the decoder have different norms, so no one rotation fits; use method=select"
        )
    return kinds == {"layer"}


def norms_of(architecture: Architecture, group: str) -> list[str]:
    """The norms along `group` that the stream passes, by module name; a head's own norm is not one of them."""
    return [
        p.name.removesuffix(".weight")
        for p in blueprint(architecture)
        if p.role == "scale" and p.axes[0].group == group and p.component != "head"
    ]


def streams_of(architecture: Architecture, group: str) -> list[str]:
    """The norms along `group` whose output is the stream itself, so that no reader can take their weight in."""
    return [norm for norm in norms_of(architecture, group) if not readers(architecture, norm)]


def principal(
    moments: Moments, norms: list[str], width: int, *, centred: bool, weights: Mapping[str, float] | None = None
) -> Basis:
    """The basis of the `width` channels that keep most of the stream.

    The kept directions may be turned among themselves at no cost. They are turned so that the new channels are as
    near as they can be to the old channels that carry most (orthogonal Procrustes): norms whose weights cannot be
    folded away work channel by channel, and at the old width the basis is the identity.

    Args:
        weights: what each norm's share counts; alike where left out.
    """
    total = moments.total(norms, weights)
    old, rank = len(total), width - 1 if centred else width
    directions = torch.linalg.eigh(total).eigenvectors.flip(1)
    if centred:
        # The constant vector has no energy in a centred stream; keep it out even where others have none either.
        ones = torch.full((old, 1), old**-0.5, dtype=torch.float64)
        directions = torch.linalg.qr(torch.cat((ones, directions), 1)).Q[:, 1:]
    kept = directions[:, :rank]
    loudest = moments.loudness(norms).topk(width).indices.sort().values
    frame = without_mean(width) if centred else torch.eye(width, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(kept[loudest].T @ frame)
    matrix = kept @ (u @ vh) @ frame.T
    if centred:  # the mean stays the mean: what reads the stream past a norm may look at it
        matrix = matrix + (old * width) ** -0.5
    return Basis(matrix, centred, retained(moments, norms, kept))


def retained(moments: Moments, norms: list[str], kept: Tensor) -> dict[str, float]:
    """The share of each norm's second moment that lies in orthonormal directions, old channels × directions."""
    return {n: float((kept.T @ moments.mean(n) @ kept).trace() / moments.mean(n).trace()) for n in norms}


def without_mean(width: int) -> Tensor:
    """An orthonormal basis, width × (width − 1), of the vectors whose channels sum to zero.

    The columns of a Householder reflection that turns the constant vector into the last axis.
    """
    target = torch.zeros(width, dtype=torch.float64)
    target[-1] = 1.0
    normal = torch.full((width,), width**-0.5, dtype=torch.float64) - target
    length = normal.norm()
    if length < 1e-12:
        return torch.eye(width, dtype=torch.float64)[:, :-1]
    normal = normal / length
    reflection = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    return reflection[:, :-1]


def with_stored_positions(state: State, group: str) -> State:
    """The state with sinusoidal positions as a learned table, where they are added along `group`.

    A computed sinusoid has its own channels and follows no cut; a table that holds the same numbers does.
    """
    a = state.architecture
    if group != ("residual" if a.embedding.d_embed is None else "embed"):
        return state
    tables: dict[str, Tensor] = {}
    changes: dict[str, object] = {}
    for name, stack in a.stacks:
        if stack.positions.kind == "sinusoidal":
            rows = torch.arange(stack.positions.max_positions or 0)[None]
            tables[f"{name}.input.positions.weight"] = sinusoid(rows, a.width)[0].double()
            changes[f"{name}.positions.kind"] = "learned"
            changes[f"{name}.positions.offset"] = 0
    return state.with_(tables, changes)


def rotate(state: State, group: str, field: str, basis: Basis, moments: Moments) -> tuple[State, Step]:
    """Write the axis `group` in the channels of `basis`.

    Norms whose output is the stream keep a weight, the old one spread over the new channels; that is exact only where
    the basis leaves the channels as they are. A head's transform is left to `refit_transform`.

    Args:
        field: the architecture's field that holds the axis' size, `d_model` or `embedding.d_embed`.
    """
    old, new = basis.matrix.shape
    state = with_stored_positions(state, group)
    norms = norms_of(state.architecture, group)
    is_same = old == new and torch.allclose(basis.matrix, torch.eye(old, dtype=torch.float64), atol=1e-9)
    uneven = [norm for norm in norms if _keeps_weight(state, norm) and _is_uneven(state, norm)]
    state = fold(state, norms)
    frees_mean = has_free_mean(state.architecture, group) and not is_same
    changed = state.blank()
    for parameter, dim in state.along(group):
        if parameter.role in ("scale", "shift") or _is_head_output(parameter, group):
            continue
        reads = parameter.role == "reader" or (
            parameter.role == "writer" and dim == len(parameter.axes) - 1 and dim > 0
        )
        matrix = basis.writing if frees_mean and not reads else basis.matrix
        source = changed if parameter.name in changed else state.tensors
        changed[parameter.name] = multiply(source[parameter.name], dim, matrix)
    for norm in norms:
        changed |= _norm_after(state, norm, basis, moments, frees_mean=frees_mean)
    changed |= _rescaled(state, field, old, new, changed)
    if group == "residual":
        for follower in ("pooled", "transform"):  # as wide as the stream by definition
            for parameter, dim in state.along(follower):
                whole = changed[parameter.name] if parameter.name in changed else state.wide(parameter.name)
                changed[parameter.name] = whole.narrow(dim, 0, new)
    sizes: dict[str, object] = {field: new}
    if group == "residual" and not streams_of(state.architecture, group):
        # Elsewhere the norms' sizes are not those of the stream alone, and some families' files hold no other eps.
        sizes |= {f"{name}.norm.eps": s.norm.eps * old / new for name, s in state.architecture.stacks}
    exact = old == new and (is_same or not uneven)
    name = f"rotate {field.removeprefix('embedding.')} {old} → {new}"
    step = Step(name, exact, basis.energy, "share of the stream's energy that each norm still sees")
    return state.with_(changed, sizes), step


def has_free_mean(architecture: Architecture, group: str) -> bool:
    """Whether nothing looks at the mean of the axis' stream: every norm removes it, and all is read through norms."""
    if group != "residual" or streams_of(architecture, group):
        return False
    return all(stack.norm.kind == "layer" and stack.final_norm for _, stack in architecture.stacks)


def _keeps_weight(state: State, norm: str) -> bool:
    """Whether a norm's weight cannot be folded into what reads it."""
    return is_tied(state.architecture, norm) or not readers(state.architecture, norm)


def _is_uneven(state: State, norm: str) -> bool:
    """Whether a norm's weight differs between channels: no rotation passes it exactly."""
    scale = state.wide(f"{norm}.weight")
    return bool((scale != scale[0]).any())


def _is_head_output(parameter: Parameter, group: str) -> bool:
    """Whether a head's transform writes the axis itself, the embedding's width."""
    return group == "embed" and parameter.name.startswith("head.language.transform.")


def _norm_after(state: State, norm: str, basis: Basis, moments: Moments, *, frees_mean: bool) -> dict[str, Tensor]:
    """A norm's weight and bias once its axis is rotated."""
    new = basis.matrix.shape[1]
    changed = {f"{norm}.weight": torch.full((new,), basis.growth, dtype=torch.float64)}
    if f"{norm}.bias" in state.tensors:
        changed[f"{norm}.bias"] = basis.matrix.T @ state.wide(f"{norm}.bias")  # folded: alike in all channels, or none
    if is_tied(state.architecture, norm):
        changed |= _tied_norm(state, norm, basis, moments, frees_mean=frees_mean)
    elif not readers(state.architecture, norm):
        scale = state.wide(f"{norm}.weight")
        changed[f"{norm}.weight"] = basis.growth * (basis.matrix.square().T @ scale)
    return changed


def _tied_norm(state: State, norm: str, basis: Basis, moments: Moments, *, frees_mean: bool) -> dict[str, Tensor]:
    """The scale of a norm that a tied table reads: least squares between old and new logits.

    Old logits are E(γ∘x̂), new ones E'(γ'∘x̂') with x̂' = √(d/d') Rᵀx̂. Over the text's second moment C of x̂ that
    is a quadratic form in γ' with matrix (E'ᵀE') ∘ (RᵀCR)·d/d'.
    """
    table = state.tensors["embedding.tokens.weight"].detach()
    scale = state.wide(f"{norm}.weight")
    r = basis.matrix
    writing = basis.writing if frees_mean else r
    inner = reading = torch.zeros((), dtype=torch.float64)
    for some in blocks(table):
        rows = table[some].to("cpu", torch.float64)
        new_rows = rows @ writing
        inner, reading = inner + new_rows.T @ new_rows, reading + new_rows.T @ (rows * scale)
    seen = moments.mean(norm) @ r * basis.growth
    quadratic = inner * (r.T @ seen * basis.growth)
    linear = (reading * seen.T).sum(1)
    ridge = 1e-8 * quadratic.diagonal().mean() * torch.eye(len(quadratic), dtype=torch.float64)
    start = r.square().T @ scale  # what the fit falls back to where the text says nothing
    fitted = torch.linalg.solve(quadratic + ridge, linear + ridge @ start)
    changed = {f"{norm}.weight": fitted * basis.growth}
    if f"{norm}.bias" in state.tensors:
        shift = state.wide(f"{norm}.bias")
        changed |= (
            _tied_shift(norm, table, writing, r, shift, fitted * basis.growth)
            if frees_mean
            else {f"{norm}.bias": r.T @ shift}
        )
    return changed


def _tied_shift(
    norm: str, table: Tensor, writing: Tensor, r: Tensor, shift: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    """A tied LayerNorm's bias, and a place for what it cannot express.

    The centred table has no component along the constant vector, and no LayerNorm sees one that is added. So
    the part of E·β that E'·β' misses is written there, a constant per token, and β' gets a mean to read it. The norm's
    weight reads it too, so that mean is large beside it, and what is written accordingly small.
    """
    loud = 4.0 * float(scale.square().mean().sqrt().clamp_min(1e-12))
    moved = r.T @ (shift - shift.mean())
    new_table = multiply(table, 1, writing)
    for some in blocks(table):
        missing = table[some].to("cpu", torch.float64) @ shift - new_table[some] @ moved
        new_table[some] += missing[:, None] / (loud * new_table.shape[1])
    return {f"{norm}.bias": moved + loud, "embedding.tokens.weight": new_table}


def _rescaled(state: State, field: str, old: int, new: int, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make up for the factors of the forward pass that depend on the width itself."""
    a, out = state.architecture, {}
    embedding_field = "d_model" if a.embedding.d_embed is None else "embedding.d_embed"
    language = a.head.language
    table_factor = math.sqrt(old / new) if a.embedding.scaled and field == embedding_field else 1.0
    head_factor = math.sqrt(new / old) if language is not None and language.scaled and field == "d_model" else 1.0
    if table_factor != 1.0:
        out["embedding.tokens.weight"] = changed["embedding.tokens.weight"] * table_factor
    if language is None:
        return out
    tied_factor = 1.0 / table_factor if language.tied else 1.0  # what reads a table that grew has to say less
    if head_factor == tied_factor == 1.0:
        return out
    if language.transform is not None or a.embedding.d_embed is not None:
        # A transform that gives the table's own channels is fitted to the table as it is (`refit_transform`).
        first = "transform" if language.transform is not None else "projection"
        name, factor = f"head.language.{first}.weight", head_factor * (tied_factor if first == "projection" else 1.0)
        return out | {name: changed.get(name, state.wide(name)) * factor}
    if not language.tied:
        name = "head.language.output.weight"
        return out | {name: changed[name] * head_factor}
    final = next(p.norm for p in blueprint(a) if p.name == "head.language.output.weight")
    for part in ("weight", "bias"):
        if f"{final}.{part}" in changed:
            out[f"{final}.{part}"] = changed[f"{final}.{part}"] * head_factor * tied_factor
    return out


def keep(state: State, group: str, field: str, channels: Tensor, method: str) -> tuple[State, Step]:
    """Keep some channels of an axis as they are; `channels` holds their numbers."""
    state = with_stored_positions(state, group)
    changed = state.blank()
    old = 0
    for parameter, dim in state.along(group):
        old = parameter.axes[dim].size
        source = changed if parameter.name in changed else state.tensors
        kept = source[parameter.name].detach().cpu().index_select(dim, channels)
        changed[parameter.name] = kept.to(torch.float64)
    changed |= _rescaled(state, field, old, len(channels), changed) if old else {}
    step = Step(f"{method} {field.removeprefix('embedding.')} {old} → {len(channels)}", len(channels) == old, {})
    return state.with_(changed, {field: len(channels)}), step
