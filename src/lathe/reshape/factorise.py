"""A token table of rank e with a matrix that lifts it to d_model (ALBERT, Lan et al. 2020, §3.1), and the way back.

V × d numbers become V × e and e × d, which saves parameters where e < V·d/(V + d).

*To a factor.* The table, and the positions and token types that are added to it, are written in the e directions in
which their sum moves most on the text; so tokens count as often as they come. A norm on the embeddings now stands
before the lifting matrix: with R the best e directions (without a mean, for LayerNorm), the tables are multiplied by
√(e/d)·R, the norm keeps weight 1, and the matrix is √(d/e)·diag(γ)R with bias β. One matrix holds one γ, so two stacks
with such a norm each are refused. An untied head W becomes U (UᵀW), U the best directions of what W writes on the
text. A tied head reads the new table through the least-squares map. A masked-LM head's transform is fitted again.

*To a factor as wide as the model.* The matrix is the identity, and nothing changes: what ALBERT's files want at least.

*Back.* Table and matrix are multiplied: exact where nothing stands between them. The head's projection is multiplied
into its own table likewise, so a tied head is untied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import NO_TEXT, Batch, moments, unit
from lathe.reshape.operation import Operation, measured, plain
from lathe.reshape.prune import Activity, activities
from lathe.reshape.state import State, Step, blocks, multiply
from lathe.reshape.stream import heads_held, last_streams
from lathe.reshape.transform import refit_transform, transform_rows
from lathe.reshape.walk import read_by, token_rows
from lathe.reshape.width import principal, with_stored_positions

_ENERGY = "share of what the text moves through the token table that is kept"
_TOKENS = "embedding.tokens.weight"
_OUTPUT = "head.language.output"


def followers(source: Architecture, target: Architecture) -> dict[str, Any]:
    """What a factor drags along: the matrix has a bias where a norm's bias has to go there."""
    if (source.embedding.d_embed is None) == (target.embedding.d_embed is None):
        return {}
    shifts = any(stack.input_norm and stack.norm.bias for _, stack in source.stacks)
    return {"embedding.projection_bias": target.embedding.d_embed is not None and shifts}


def plan_embedding(done: Architecture, target: Architecture) -> list[Operation]:
    """The operation that factorises the embedding or undoes it, if one is wanted."""
    old, new = done.embedding.d_embed, target.embedding.d_embed
    changes: dict[str, Any] = {"embedding.d_embed": new, **followers(done, target)}
    if old is None and new is not None:
        if new == done.d_model:
            bias = target.embedding.projection_bias
            changes["embedding.projection_bias"] = bias
            return [Operation(changes, plain(lift, bias))]
        _require_one_norm(done, new)
        return [Operation(changes, measured(factorise, new))]
    if old is not None and new is None:
        _require_no_norm(done)
        return [Operation(changes, plain(unfactorise))]
    return []


def _require_one_norm(architecture: Architecture, width: int) -> None:
    if width > architecture.d_model:
        raise RequestError(
            f"d_embed={width}: wider than d_model={architecture.d_model}, which saves nothing; give a smaller number"
        )
    if width > architecture.embedding.vocab_size:
        raise RequestError(
            f"d_embed={width}: more than the {architecture.embedding.vocab_size} tokens have; give a smaller number"
        )
    if sum(stack.input_norm for _, stack in architecture.stacks) and len(list(architecture.stacks)) > 1:
        raise RequestError(
            f"d_embed={width}: the stacks norm their embeddings, and one lifting matrix for both cannot hold "
            "each norm's scale; cut d_model or vocab_size instead"
        )


def factorise(model: Transformer, batches: Sequence[Batch], state: State, width: int) -> tuple[State, Step]:
    """The model with a token table of `width` channels and a matrix that lifts them to d_model.

    Args:
        model: the model of `state`.

    Raises:
        RequestError: no text, or norms that the matrix cannot take in.
    """
    _require_one_norm(state.architecture, width)
    before, a = with_stored_positions(state, "residual"), state.architecture
    normed = next((name for name, stack in a.stacks if stack.input_norm), None)
    if normed is None:
        into, changed, energy = _plain_factor(model, batches, before, width)
    else:
        into, changed, energy = _normed_factor(model, batches, before, normed, width)
    for parameter, dim in before.along("residual"):
        if parameter.role == "table":
            changed[parameter.name] = multiply(before.tensors[parameter.name], dim, into)
    if a.embedding.scaled:
        changed[_TOKENS] = changed[_TOKENS] * math.sqrt(a.d_model / width)
    sizes: dict[str, Any] = {"embedding.d_embed": width, **followers(a, a.with_(d_embed=width))}
    exact = width == a.d_model and a.head.language is None
    step = Step(f"factorise the embedding {a.d_model} → {width}", exact, {"energy": energy}, _ENERGY)
    return _with_head(model, batches, before, changed, sizes), step


def lift(state: State, bias: bool) -> tuple[State, Step]:
    """The model with a lifting matrix that is the identity, and the same before its head. Exact.

    Args:
        bias: whether the matrix has a bias, which is zero.
    """
    a, eye = state.architecture, torch.eye(state.architecture.d_model, dtype=torch.float64)
    added = {"embedding.projection.weight": eye}
    if bias:
        added["embedding.projection.bias"] = torch.zeros(a.d_model, dtype=torch.float64)
    if a.head.language is not None and a.head.language.transform is None:
        added["head.language.projection.weight"] = eye
    step = Step(f"lift the embedding {a.d_model} → {a.d_model} by the identity", True, {})
    return state.with_(added, {"embedding.d_embed": a.d_model, "embedding.projection_bias": bias}), step


def _plain_factor(
    model: Transformer, batches: Sequence[Batch], state: State, width: int
) -> tuple[Tensor, dict[str, Tensor], float]:
    """What the tables are multiplied with, the lifting matrix, and the share of the embeddings that is kept."""
    places = [f"{name}.input.dropout" for name, _ in state.architecture.stacks]
    seen = activities(model, batches, places)
    moving = torch.stack([each.moments(centred=False) for each in seen.values()]).sum(0)
    wanted, language = moving, state.architecture.head.language
    if language is not None and language.tied:  # the head reads the table too, and has an equal say
        gram = _gram(state.tensors[_TOKENS])
        wanted = moving / moving.trace() + gram / gram.trace()
    basis = torch.linalg.eigh(wanted).eigenvectors.flip(1)[:, :width]
    energy = float((basis.T @ moving @ basis).trace() / moving.trace())
    return basis, {"embedding.projection.weight": basis}, energy


def _normed_factor(
    model: Transformer, batches: Sequence[Batch], state: State, stack_name: str, width: int
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The same where a norm stands on the embeddings."""
    norm, stack = f"{stack_name}.input.norm", dict(state.architecture.stacks)[stack_name]
    centred, language = stack.norm.kind == "layer", state.architecture.head.language
    seen, names = moments(model, batches, [norm]), [norm]
    if language is not None and language.transform is not None:
        seen.add("head.language.norm", unit(transform_rows(model, batches)[1], centred=centred))
        names.append("head.language.norm")
    basis = principal(seen, names, width, centred=centred)
    changed = {
        "embedding.projection.weight": state.wide(f"{norm}.weight")[:, None] * basis.matrix * basis.growth,
        f"{norm}.weight": torch.ones(width, dtype=torch.float64),
    }
    if stack.norm.bias:
        changed["embedding.projection.bias"] = state.wide(f"{norm}.bias")
        changed[f"{norm}.bias"] = torch.zeros(width, dtype=torch.float64)
    return basis.writing / basis.growth, changed, basis.energy[norm]


def _with_head(
    model: Transformer, batches: Sequence[Batch], state: State, changed: dict[str, Tensor], sizes: dict[str, Any]
) -> State:
    """The factorised state, its head reading the narrow table."""
    language, width = state.architecture.head.language, sizes["embedding.d_embed"]
    if language is None:
        return state.with_(changed, sizes)
    if language.tied:
        narrow = changed[_TOKENS]
        onto = torch.linalg.pinv(_gram(narrow), hermitian=True) @ _gram(narrow, state.tensors[_TOKENS])
    else:
        table = state.tensors[f"{_OUTPUT}.weight"].detach()
        changed[f"{_OUTPUT}.weight"], onto = split_head(table, _read_by_output(model, batches), width)
    if language.transform is None:
        changed["head.language.projection.weight"] = onto
        return state.with_(changed, sizes)
    x_ND, old_NE = transform_rows(model, batches)
    refitted, _ = refit_transform(state, state.with_(changed, sizes), x_ND, old_NE, onto.T)
    return refitted


def _read_by_output(model: Transformer, batches: Sequence[Batch]) -> Tensor:
    """The second moment of what the head's table reads over the text."""
    seen, training, last = Activity(), model.training, list(model.architecture.stacks)[-1][0]
    model.eval()
    with torch.no_grad():
        ends = last_streams(model, batches)
        with heads_held(model):
            for batch, left_BTD in ends:
                given = read_by(model, _OUTPUT, batch, left_BTD)
                seen.add(given.flatten(0, -2)[token_rows(model, last, given.shape[:-1], batch)])
    model.train(training)
    if not seen.tokens:
        raise RequestError(NO_TEXT)
    return seen.moments(centred=False)


def _gram(table_VD: Tensor, other_VD: Tensor | None = None) -> Tensor:
    """Σ over the rows of a table of the products of its channels, or of its and another one's."""
    found = torch.zeros((), dtype=torch.float64)
    for some in blocks(table_VD):
        rows = table_VD[some].detach().to("cpu", torch.float64)
        found = found + rows.T @ (rows if other_VD is None else other_VD[some].detach().to("cpu", torch.float64))
    return found


def split_head(table_VD: Tensor, read_DD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best V × `width` and `width` × D factors of a head's table, for inputs of second moment `read_DD`."""
    values, vectors = torch.linalg.eigh(read_DD)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    gram = _gram(table_VD)
    best = torch.linalg.eigh(root.T @ gram @ root).eigenvectors.flip(1)[:, :width]
    directions = torch.linalg.qr(multiply(table_VD, 1, root @ best)).Q
    size = gram.trace().sqrt() / directions.norm()  # rows as large as they were
    return directions * size, _gram(directions, table_VD) / size


def _require_no_norm(architecture: Architecture) -> None:
    language = architecture.head.language
    if any(stack.input_norm for _, stack in architecture.stacks):
        raise RequestError(
            "d_embed=None: a norm stands between the token table and the matrix that lifts it, so the two cannot be "
            f"one; keep d_embed={architecture.embedding.d_embed}"
        )
    if language is not None and language.transform is not None:
        raise RequestError(
            "d_embed=None: the head norms a vector of the embedding's width, which would have another width; "
            f"keep d_embed={architecture.embedding.d_embed}"
        )
    if language is not None and language.tied:
        raise RequestError(
            "d_embed=None: a tied head reads the narrow table through a matrix of its own, which one wide table for "
            "both cannot hold; add tied=false"
        )


def unfactorise(state: State) -> tuple[State, Step]:
    """The model with one token table, d_model wide. Exact.

    Raises:
        RequestError: a norm between the table and its matrix, a head with a transform, or a tied head.
    """
    _require_no_norm(state.architecture)
    state = with_stored_positions(state, "embed")
    a = state.architecture
    lift = state.wide("embedding.projection.weight")
    old, new = math.sqrt(a.width), math.sqrt(a.d_model)
    changed = {p.name: multiply(state.wide(p.name), d, lift.T) for p, d in state.along("embed") if p.role == "table"}
    if a.embedding.scaled:
        changed[_TOKENS] = changed[_TOKENS] * old / new
    if a.embedding.projection_bias:
        changed[_TOKENS] = changed[_TOKENS] + state.wide("embedding.projection.bias") / (
            new if a.embedding.scaled else 1.0
        )
    if a.head.language is not None:
        changed[f"{_OUTPUT}.weight"] = state.wide(f"{_OUTPUT}.weight") @ state.wide("head.language.projection.weight")
    step = Step(f"unfactorise the embedding {a.width} → {a.d_model}", True, {})
    return state.with_(changed, {"embedding.d_embed": None, "embedding.projection_bias": False}), step
