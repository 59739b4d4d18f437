"""A masked-LM head's transform, fitted to a token table that has changed its width.

BERT's and ALBERT's heads put `norm(gelu(W x + b))` before the tied table. When the table's channels change, that
vector has to follow, and a GELU stands in the way of any rotation. So the new transform is made nearly linear: a
bias of +4 puts its inputs where GELU is the identity up to 1e-3, the norm removes the bias again, and W is the
least-squares map from the head's input to the old vector in the new channels. The norm's scale and bias are then
regressed, channel by channel, on what comes out. It is approximate; healing repairs the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lathe.model.feed_forward import ACTIVATION_FUNCTIONS
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.state import State, Step, blocks
from lathe.reshape.stream import held, last_streams
from lathe.reshape.walk import shape_of, token_rows
from lathe.reshape.width import without_mean

_BIAS = 4.0
_SPREAD = 0.7  # the inputs' standard deviation, so that hardly any reaches GELU's bend
_MOST_ROWS = 16_384


def transform_rows(model: Transformer, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The head transform's input and its norm's output at the text's tokens, N × D and N × width, float64."""
    language, name = model.head.language, list(model.architecture.stacks)[-1][0]
    assert language is not None
    assert language.transform is not None
    assert language.norm is not None
    some: list[Batch] = []
    positions = 0
    for batch in batches:
        some.append(batch)
        positions += shape_of(model, name, batch).numel()
        if positions >= _MOST_ROWS:
            break
    inputs: list[Tensor] = []
    normed: list[Tensor] = []
    training = model.training
    model.eval()
    with torch.no_grad():
        ends = last_streams(model, some)
        with held(model, [language.transform, language.norm]):
            for batch, left_BTD in ends:
                tokens = token_rows(model, name, left_BTD.shape[:2], batch)
                x_BTD = left_BTD * language.scale if language.scale != 1.0 else left_BTD
                old_BTE = language.norm(language.activation(language.transform(x_BTD)))
                inputs.append(x_BTD.flatten(0, -2)[tokens].double())
                normed.append(old_BTE.flatten(0, -2)[tokens].double())
    model.train(training)
    return torch.cat(inputs).cpu(), torch.cat(normed).cpu()


def refit_transform(before: State, state: State, x_ND: Tensor, old_NE: Tensor, into: Tensor) -> tuple[State, Step]:
    """The state with what `fitted_transform` finds."""
    changed, step = fitted_transform(before, state, x_ND, old_NE, into)
    return state.with_(changed), step


def fitted_transform(
    before: State,
    state: State,
    x_ND: Tensor,
    old_NE: Tensor,
    into: Tensor,
    *,
    weight_N: Tensor | None = None,
    ridge: float = 1e-4,
) -> tuple[dict[str, Tensor], Step]:
    """The transform and its norm, fitted so that they give the old vector in the new channels.

    Args:
        before: the state with the old table.
        state: the state whose table has the new width already.
        x_ND: the head's input.
        old_NE: what the norm gave.
        into: old channels × new channels.
        weight_N: how much each row counts; alike where left out.
        ridge: a share of the inputs' mean square.
    """
    language = state.architecture.head.language
    target_NE = old_NE @ into
    assert language is not None
    assert language.transform is not None
    ones = torch.ones(len(x_ND), 1, dtype=torch.float64)
    design = torch.cat((x_ND, ones), 1)
    share_N1 = (torch.ones(len(x_ND), dtype=torch.float64) if weight_N is None else weight_N)[:, None]
    share_N1 = share_N1 / share_N1.sum()
    gram = (design * share_N1).T @ design
    held = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    fitted = torch.linalg.solve(gram + held, (design * share_N1).T @ target_NE)
    scale = _SPREAD / float((design @ fitted).std())
    weight, bias = fitted[:-1].T * scale, fitted[-1] * scale + _BIAS
    inner = ACTIVATION_FUNCTIONS[language.transform](x_ND @ weight.T + bias)
    norm = list(state.architecture.stacks)[-1][1].norm
    if norm.kind == "layer":
        normed = torch.nn.functional.layer_norm(inner, inner.shape[-1:], eps=norm.eps)
    else:
        normed = inner * torch.rsqrt(inner.square().mean(-1, keepdim=True) + norm.eps)
    mean_n, mean_t = (normed * share_N1).sum(0), (target_NE * share_N1).sum(0)
    if not norm.bias:  # nothing can move the mean
        mean_n, mean_t = torch.zeros_like(mean_n), torch.zeros_like(mean_t)
    centred = normed - mean_n
    slope = (share_N1 * centred * (target_NE - mean_t)).sum(0)
    slope = slope / (share_N1 * centred.square()).sum(0).clamp_min(1e-12)
    error = target_NE - (slope * centred + mean_t)
    all_of_it = (share_N1 * (target_NE - mean_t).square()).sum()
    unexplained = float((share_N1 * error.square()).sum() / all_of_it.clamp_min(1e-300))
    measures = "share of the old vectors' variance that the new ones miss"
    step = Step("refit the head's transform", False, {"unexplained": unexplained}, measures)
    changed = {
        "head.language.transform.weight": weight,
        "head.language.transform.bias": bias,
        "head.language.norm.weight": slope,
    }
    if norm.bias:
        changed["head.language.norm.bias"] = mean_t - slope * mean_n
    if language.bias:
        # What the mean vector said in channels that are gone is a constant for each token: the output bias takes it.
        read = "embedding.tokens.weight" if language.tied else "head.language.output.weight"
        given = (share_N1 * (slope * centred + mean_t)).sum(0)
        mean_old = (share_N1 * old_NE).sum(0)
        old_VE, new_VE = before.tensors[read].detach(), state.tensors[read].detach()
        lost = [
            old_VE[some].to("cpu", torch.float64) @ mean_old - new_VE[some].to("cpu", torch.float64) @ given
            for some in blocks(old_VE)
        ]
        changed["head.language.output.bias"] = before.wide("head.language.output.bias") + torch.cat(lost)
    return changed, step


def onto_table(new_VE: Tensor, old_VD: Tensor, often_V: Tensor | None = None) -> Tensor:
    """New × old: the vector whose product with the new table is nearest to the old vector's with the old one.

    Args:
        often_V: how much each token counts; alike where left out.
    """
    weight = torch.full((len(new_VE),), 1.0 / len(new_VE), dtype=torch.float64) if often_V is None else often_V
    gram, reading = products(new_VE, old_VD, weight)
    found: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-8) @ reading
    return found


def products(new_VE: Tensor, old_VD: Tensor, often_V: Tensor) -> tuple[Tensor, Tensor]:
    """Σ often · n nᵀ and Σ often · n oᵀ of two tables' rows about their means, block by block.

    What is added to every token's logit alike changes no prediction, so a table counts about its mean.

    Args:
        often_V: how much each token counts; sums to one.
    """
    gram = reading = mean_new = mean_old = torch.zeros((), dtype=torch.float64)
    for some in blocks(new_VE):
        new, old = (each[some].detach().to("cpu", torch.float64) for each in (new_VE, old_VD))
        left = new.T * often_V[some]
        gram, reading = gram + left @ new, reading + left @ old
        mean_new, mean_old = mean_new + left.sum(1), mean_old + often_V[some] @ old
    return gram - torch.outer(mean_new, mean_new), reading - torch.outer(mean_new, mean_old)


def loudest_directions(rows_NE: Tensor, width: int) -> Tensor:
    """Old channels × new ones without a mean of their own: the directions in which rows vary most."""
    centred = rows_NE - rows_NE.mean(0)
    directions: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    return directions[:, : width - 1] @ without_mean(width).T
