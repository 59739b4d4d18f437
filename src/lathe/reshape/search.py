"""A basis for a narrower stream that is looked for by what the predictions lose, not by how much moves.

The principal directions keep most of the stream's energy. But what moves most is not what matters most: a direction
in which the stream hardly moves may decide a prediction, and what is left out is often written in what stays, so that
a reader fitted to it gets it back. Three things are put right here.

1. *What matters.* An error e at a norm's output costs ½ eᵀGe nats, G from `lathe.reshape.sensitivity`.
2. *What readers get back.* Given a basis Q, the narrow norm hands on ŷ = Qᵀx̂/‖Qᵀx̂‖ of what was x̂. Its readers will be
   fitted, so what counts of the old output t = γ∘x̂ is only what no linear map restores: t − B ŷ, with B the least
   squares solution for this very Q. Where the norm has a bias its readers have one too, and both sides count about
   their means. The norm that a tied table reads has no readers of its own: there t is restored by Q(γ'∘ŷ), with the γ'
   that loses least.
3. *One basis for all.* Q minimises Σ ½ tr(G E[(t − Bŷ)(t − Bŷ)ᵀ]) over all norms, by L-BFGS with Q held orthonormal
   (the Q of a QR decomposition), from the principal basis with every norm's moment weighted by tr(GC)/tr(C): what an
   error there costs.

The division by ‖Qᵀx̂‖ differs from token to token, so the sum is over some thousands of them and not over a second
moment. Every eighth of these is held out: the basis is taken only if it loses less there. Measured on trained models
this takes back a third and more of what the principal basis costs at half of the width (docs/reshaping.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.reshape.calibrate import Moments
from lathe.reshape.sensitivity import Sensitivity
from lathe.reshape.width import Basis, retained, without_mean

UNSOUGHT = "no basis was looked for"  # what the note begins with, then
STEPS = 100
_WORK = 10**14  # floating-point operations; one core does some 30 billion a second
_FEWEST = 5  # steps that are worth the gradients
_RIDGE = 1e-4  # of the mean square of what a reader is given
HELD_EVERY = 8  # tokens, of which the last is held out
_LINE_SEARCH = 25  # losses that L-BFGS may compute beside one a step
_NOTHING = 1e-5  # nats a prediction


@dataclass(frozen=True)
class Sought:
    """What the basis is to serve.

    Args:
        seen: rows and G of every norm.
        scales: the norms' weights.
        shifted: the norms that have biases, and so have their readers.
        tied: the norms that a tied table reads.
    """

    seen: Sensitivity
    scales: Mapping[str, Tensor]
    shifted: frozenset[str]
    tied: frozenset[str]


@dataclass(frozen=True)
class Found:
    """A basis, and how it was found.

    Args:
        before, after: what the basis that was started from and this one lose on tokens held out, in nats a prediction.
        steps: how many were made.
    """

    basis: Basis
    before: float
    after: float
    steps: int

    @property
    def note(self) -> str:
        """It as a sentence."""
        if not self.steps:
            why = "the one that was started from"
            return f"{UNSOUGHT}: {why} loses {self.before:.4f} nats a prediction, to first order"
        made = f"the basis was looked for in {self.steps} steps"
        if not self.after < self.before:
            return f"{made}, and none lost less than the one that was started from: {self.before:.4f} nats a prediction"
        loss = f"its loss, to first order, is {self.after:.4f} nats a prediction"
        return f"{made}: {loss}, and {self.before:.4f} before them"


def steps_within(rows: int, old: int, new: int) -> int:
    """How many steps are made where nobody says: the usual number; fewer or none where they would take an hour.

    Args:
        rows: of all norms together.
    """
    each = 2 * rows * (7 * old * new + new * new + old * old)
    most = min(STEPS, _WORK // max(each, 1))
    return most if most >= _FEWEST else 0


def rows_for(width: int) -> int:
    """How many tokens are looked at, at least: some for each direction that is kept."""
    return max(2500, 4 * width)


def worth(sought: Sought, moments: Moments) -> dict[str, float]:
    """What an error of the stream's size costs at each norm, tr(GC)/tr(C), over the mean of all norms."""
    costs = {}
    for norm in sought.seen.felt:
        moment, scale_D = moments.mean(norm), sought.scales[norm]
        felt = sought.seen.felt[norm] * scale_D * scale_D[:, None]
        costs[norm] = float((felt * moment).sum() / moment.trace().clamp_min(1e-300))
    mean = sum(costs.values()) / len(costs)
    return {norm: cost / mean if mean > 0 else 1.0 for norm, cost in costs.items()}


def search(start: Basis, sought: Sought, moments: Moments, steps: int) -> Found:
    """The basis that loses least, from `start` on; `start` itself where none loses less on the tokens held out.

    Args:
        moments: what the retained energy is counted from.
        steps: of the search, at most.
    """
    old, new = start.matrix.shape
    frames = _Frames(*(_frame(size, start.centred) for size in (old, new)))
    start_EF = frames.wide_DE.T @ start.matrix.float() @ frames.narrow_WF
    before = _held_loss(sought, frames, start_EF)
    if before <= _NOTHING or not steps or not start_EF.numel():
        return Found(start, before, before, 0)
    found_EF, made = _descended(sought, frames, start_EF, steps)
    after = _held_loss(sought, frames, found_EF)
    if not after < before:
        return Found(start, before, before, made)
    kept = (without_mean(old) if start.centred else torch.eye(old).double()) @ _orthonormal(found_EF.double())
    matrix = kept @ (without_mean(new).T if start.centred else torch.eye(new).double())
    if start.centred:  # the mean stays the mean
        matrix = matrix + (old * new) ** -0.5
    return Found(Basis(matrix, start.centred, retained(moments, list(start.energy), kept)), before, after, made)


@dataclass(frozen=True)
class _Frames:
    """Where the basis is looked for: among all channels, or, where norms remove the mean, among those without one.

    D is the old width and W the new one; E and F are these, or one less.
    """

    wide_DE: Tensor
    narrow_WF: Tensor


def _frame(size: int, centred: bool) -> Tensor:
    return without_mean(size).float() if centred else torch.eye(size)


def _orthonormal(free_EF: Tensor) -> Tensor:
    """The Q of a QR decomposition, with the signs that leave an orthonormal matrix as it is."""
    q, r = torch.linalg.qr(free_EF)
    signed: Tensor = q * r.diagonal().sign()
    return signed


def _descended(sought: Sought, frames: _Frames, start_EF: Tensor, steps: int) -> tuple[Tensor, int]:
    """L-BFGS over matrices whose Q is the basis; and how many steps were made before none led further down."""
    free_EF = start_EF.clone().requires_grad_()
    tries = max(5 * steps // 4, steps + _LINE_SEARCH)  # else a few steps' line searches would use up all that there are
    optimizer = torch.optim.LBFGS(
        [free_EF], max_iter=steps, max_eval=tries, history_size=10, line_search_fn="strong_wolfe"
    )
    scale = 0.0

    def loss() -> Tensor:
        """Leaves the gradient too. One norm after the other, so that one norm's graph is there at a time."""
        nonlocal scale
        q_DF = frames.wide_DE @ _orthonormal(free_EF)
        leaf_DF, total = q_DF.detach().requires_grad_(), 0.0
        for norm in sought.seen.rows:
            nats, slope = _missed(sought, frames, norm, leaf_DF)
            slope.backward()
            total += nats
        scale = scale or 1.0 / total  # the first loss is one
        optimizer.zero_grad()
        assert leaf_DF.grad is not None
        q_DF.backward(leaf_DF.grad * scale)
        return torch.tensor(total * scale)

    with torch.enable_grad():
        optimizer.step(loss)
    return _orthonormal(free_EF.detach()), optimizer.state[free_EF]["n_iter"]


def _held_loss(sought: Sought, frames: _Frames, q_EF: Tensor) -> float:
    with torch.no_grad():
        q_DF = frames.wide_DE @ q_EF
        return sum(_missed(sought, frames, norm, q_DF, held=True)[0] for norm in sought.seen.rows)


def _missed(sought: Sought, frames: _Frames, norm: str, q_DF: Tensor, *, held: bool = False) -> tuple[float, Tensor]:
    """What no reader gets back at one norm, in nats, and a scalar whose gradient is that of the nats.

    The reader is the best one for this basis. So the loss does not change with it to first order, and the gradient
    is taken with the reader as it is.

    Args:
        held: measure it on the tokens held out; the reader is fitted on the others in any case.
    """
    felt_DD = sought.seen.felt[norm].float()
    rows_ND, scale_D = sought.seen.rows[norm], sought.scales[norm].float()
    apart_N = torch.arange(len(rows_ND)) % HELD_EVERY == HELD_EVERY - 1
    x_ND = rows_ND[~apart_N]
    gain_W, reader_FD = None, torch.zeros(())
    with torch.no_grad():
        y_NF, t_ND = _narrow(x_ND, q_DF), x_ND * scale_D
        mean_F, mean_D = (y_NF.mean(0), t_ND.mean(0)) if norm in sought.shifted else (torch.zeros(()), torch.zeros(()))
        if norm in sought.tied:
            gain_W = _gain((y_NF - mean_F) @ frames.narrow_WF.T, t_ND - mean_D, q_DF @ frames.narrow_WF.T, felt_DD)
        else:
            reader_FD = _reader(y_NF - mean_F, t_ND - mean_D)
    if held:
        x_ND = rows_ND[apart_N]
    if gain_W is not None:
        reader_FD = frames.narrow_WF.T * gain_W @ (q_DF @ frames.narrow_WF.T).T
    error_ND = x_ND * scale_D - mean_D - (_narrow(x_ND, q_DF) - mean_F) @ reader_FD
    slope_ND = (error_ND @ felt_DD).detach()
    twice = (error_ND * slope_ND).sum() / max(len(x_ND), 1)
    return 0.5 * float(twice.detach()), twice


def _narrow(x_ND: Tensor, q_DF: Tensor) -> Tensor:
    """What the norm of a narrower stream hands on, up to its weight."""
    y_NF = x_ND @ q_DF
    return y_NF / y_NF.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _reader(y_NF: Tensor, t_ND: Tensor) -> Tensor:
    """The least-squares map from one to the other."""
    gram_FF = y_NF.T @ y_NF
    ridge = _RIDGE * gram_FF.diagonal().mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(gram_FF + ridge * torch.eye(len(gram_FF)), y_NF.T @ t_ND)
    return found


def _gain(y_NW: Tensor, t_ND: Tensor, into_DW: Tensor, felt_DD: Tensor) -> Tensor:
    """The weights γ' for which the table's own channels, Q(γ'∘y), lose least."""
    quadratic_WW = (into_DW.T @ felt_DD @ into_DW) * (y_NW.T @ y_NW)
    linear_W = ((into_DW.T @ felt_DD) * (y_NW.T @ t_ND)).sum(1)
    ridge = _RIDGE * quadratic_WW.diagonal().mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(quadratic_WW + ridge * torch.eye(len(quadratic_WW)), linear_W)
    return found
