"""Write one layer's heads and neurons in another layer's order: exact, and the first step of averaging two layers.

A feed-forward computes the same whatever the order of its neurons, and attention whatever the order of its heads.
Inside a head the queries and keys may be turned by any orthonormal matrix, and so may the values and the columns of
the output matrix that read them. Trained layers differ in all of these by chance, so their plain mean is a mean of
unlike things. Here the order is the one that makes two layers most alike (optimal assignment, as for whole models in
Git Re-Basin, Ainsworth et al. 2023, §3.1), and the turn inside a head is the nearest one (orthogonal Procrustes).

- neurons are matched by their gate, up and down weights,
- heads by the two products that they compute with, `W_qᵀ W_k` and `W_o W_v`, which no turn inside a head changes;
  query heads that share a key-value head stay together, and whole groups are matched,
- heads that a table of relative positions names (T5) keep their place, because all layers share that table,
- with rotary positions queries and keys are not turned, because the rotation is tied to their channels.

Shape suffixes: I inputs, G key-value heads, Q query heads of one of them, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lathe.architecture import Stack

# One sublayer's tensors by the name after its path: "q.weight", "norm.bias", …
Sublayer = Mapping[str, Tensor]


def assignment(score_NN: Tensor) -> Tensor:
    """For each row its column, one each, so that the sum of the scores is the largest there is.

    Shortest augmenting paths (Jonker & Volgenant 1987): O(N³), with one vector operation for each inner loop.
    """
    cost = -score_NN.detach().to("cpu", torch.float64).numpy()
    n = len(cost)
    row_price, column_price = np.zeros(n + 1), np.zeros(n)
    row_of = np.full(n + 1, n)  # by column; each search starts at one more column, which holds its row
    for row in range(n):
        row_of[n] = row
        column, least = n, np.full(n, np.inf)
        came_from, used = np.full(n, n), np.zeros(n, dtype=bool)
        while row_of[column] != n:
            here = row_of[column]
            slack = cost[here] - row_price[here] - column_price
            nearer = (slack < least) & ~used
            least[nearer], came_from[nearer] = slack[nearer], column
            following = int(np.where(used, np.inf, least).argmin())
            step = least[following]
            row_price[row_of[:n][used]] += step
            row_price[row] += step
            column_price[used] -= step
            least[~used] -= step
            column, used[following] = following, True
        while column != n:
            before = int(came_from[column])
            row_of[column] = row_of[before]
            column = before
    chosen = np.empty(n, dtype=np.int64)
    chosen[row_of[:n]] = np.arange(n)
    return torch.from_numpy(chosen)


def align_feed_forward(reference: Sublayer, other: Sublayer) -> dict[str, Tensor]:
    """`other` with its neurons in the order of `reference`'s. Exact."""
    score = torch.zeros(())
    for name in ("gate", "up", "down"):
        if f"{name}.weight" not in reference:
            continue
        ours, theirs = (_rows(each, name) for each in (reference, other))
        score = score + ours @ theirs.T / (ours.norm() * theirs.norm()).clamp_min(1e-300)
    order = assignment(score)
    out = dict(other)
    for name in ("gate", "up"):
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in other:
                out[f"{name}.{leaf}"] = other[f"{name}.{leaf}"][order]
    out["down.weight"] = other["down.weight"][:, order]
    return out


def _rows(sublayer: Sublayer, name: str) -> Tensor:
    """One row for each neuron: what a matrix and its bias hold of it."""
    weight = sublayer[f"{name}.weight"]
    if name == "down":
        return weight.T
    bias = sublayer.get(f"{name}.bias")
    return weight if bias is None else torch.cat((weight, bias[:, None]), 1)


def align_attention(reference: Sublayer, other: Sublayer, stack: Stack, *, cross: bool = False) -> dict[str, Tensor]:
    """`other` with its heads in `reference`'s order, each turned towards its counterpart. Exact.

    Args:
        cross: whether it attends to the encoder, where no positions enter.
    """
    ours, theirs = (_Heads(each, stack) for each in (reference, other))
    if cross or stack.positions.kind != "relative":
        theirs = theirs.ordered(*_matched(ours, theirs))
    keys = None if stack.positions.kind == "rotary" and not cross else _turn(ours.scores, theirs.scores)
    return theirs.written(other, keys, _turn(ours.values, theirs.values))


class _Heads:
    """Attention's matrices by head; biases are one more input."""

    def __init__(self, sublayer: Sublayer, stack: Stack) -> None:
        spec = stack.attention
        groups, width = spec.kv_heads, spec.d_head
        self.q_GQKI = _rows(sublayer, "q").view(groups, spec.n_heads // groups, width, -1)
        self.k_GKI = _rows(sublayer, "k").view(groups, width, -1)
        self.v_GKI = _rows(sublayer, "v").view(groups, width, -1)
        self.o_GQKI = sublayer["o.weight"].T.reshape(groups, spec.n_heads // groups, width, -1)

    @property
    def scores(self) -> Tensor:
        """What may be turned together on the side of queries and keys, G × K × rest."""
        return torch.cat((self.q_GQKI.transpose(1, 2).flatten(2), self.k_GKI), 2)

    @property
    def values(self) -> Tensor:
        """The same for values and outputs."""
        return torch.cat((self.o_GQKI.transpose(1, 2).flatten(2), self.v_GKI), 2)

    def ordered(self, groups: Tensor, heads_GQ: Tensor) -> _Heads:
        """The groups in this order, and in each new group its query heads in that one."""
        made = object.__new__(_Heads)
        made.k_GKI, made.v_GKI = self.k_GKI[groups], self.v_GKI[groups]
        at = groups[:, None]
        made.q_GQKI, made.o_GQKI = self.q_GQKI[at, heads_GQ], self.o_GQKI[at, heads_GQ]
        return made

    def written(self, sublayer: Sublayer, keys_GKK: Tensor | None, values_GKK: Tensor) -> dict[str, Tensor]:
        """The sublayer's tensors, turned."""
        q, k = self.q_GQKI, self.k_GKI
        if keys_GKK is not None:
            q, k = keys_GKK[:, None] @ q, keys_GKK @ k
        out = dict(sublayer)
        for name, whole in (("q", q), ("k", k), ("v", values_GKK @ self.v_GKI)):
            rows = whole.reshape(sublayer[f"{name}.weight"].shape[0], -1)
            inputs = sublayer[f"{name}.weight"].shape[1]
            out[f"{name}.weight"] = rows[:, :inputs]
            if f"{name}.bias" in sublayer:
                out[f"{name}.bias"] = rows[:, inputs]
        out["o.weight"] = (values_GKK[:, None] @ self.o_GQKI).flatten(0, 2).T
        return out


def _turn(ours_GKI: Tensor, theirs_GKI: Tensor) -> Tensor:
    """For each group the orthonormal matrix that brings `theirs` nearest to `ours`."""
    u, _, vh = torch.linalg.svd(ours_GKI @ theirs_GKI.transpose(1, 2))
    turn: Tensor = u @ vh
    return turn


def _matched(ours: _Heads, theirs: _Heads) -> tuple[Tensor, Tensor]:
    """Which group of `theirs` goes where, and which of its query heads goes where in it."""
    # ⟨AᵀB, CᵀD⟩ = Σ (A Cᵀ) ∘ (B Dᵀ): products of heads are compared without being made.
    likeness = _products(ours.q_GQKI, theirs.q_GQKI, ours.k_GKI, theirs.k_GKI)
    likeness = likeness + _products(ours.o_GQKI, theirs.o_GQKI, ours.v_GKI, theirs.v_GKI)
    groups, heads = likeness.shape[0], likeness.shape[1]
    orders = torch.empty(groups, groups, heads, dtype=torch.long)
    totals = torch.empty(groups, groups, dtype=torch.float64)
    for mine in range(groups):
        for other in range(groups):
            orders[mine, other] = assignment(likeness[mine, :, other])
            totals[mine, other] = likeness[mine, :, other].gather(1, orders[mine, other][:, None]).sum()
    chosen = assignment(totals)
    return chosen, orders[torch.arange(groups), chosen]


def _products(a_GQKI: Tensor, c_GQKI: Tensor, b_GKI: Tensor, d_GKI: Tensor) -> Tensor:
    """⟨AᵀB, CᵀD⟩ of every query head with every other, G × Q × G × Q, over the products' own sizes."""

    def inner(a: Tensor, c: Tensor, b: Tensor, d: Tensor) -> Tensor:
        ac = torch.einsum("gqki,hpli->gqhpkl", a, c)
        bd = torch.einsum("gki,hli->ghkl", b, d)
        return torch.einsum("gqhpkl,ghkl->gqhp", ac, bd)

    size = inner(a_GQKI, a_GQKI, b_GKI, b_GKI).flatten(2).flatten(0, 1).diagonal().sum()
    size = size * inner(c_GQKI, c_GQKI, d_GKI, d_GKI).flatten(2).flatten(0, 1).diagonal().sum()
    return inner(a_GQKI, c_GQKI, b_GKI, d_GKI) / size.clamp_min(1e-300).sqrt()
