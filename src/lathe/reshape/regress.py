"""Least squares from moments: a matrix or a norm fitted to what it should give, without keeping what was seen.

A narrow model's linear layer reads y where its parent read x. The best weights for `W' y ≈ t` are
`W' = Σ_ty (Σ_yy + λI)⁻¹`, and a ridge λ towards the weights there are, W₀, makes that
`W' = W₀ + (Σ_ty − W₀ Σ_yy)(Σ_yy + λI)⁻¹`: where the text says nothing, W₀ stays, and where W₀ is right already,
nothing changes at all. A bias is one more input that is always 1, and has no ridge.

λ is chosen by text that was not fitted on: the fit that misses least of it wins, W₀ itself among the candidates.
Moments are float64, and as large as the layer is wide, however long the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def with_one(x_NI: Tensor) -> Tensor:
    """Rows in float64 with a 1 at their end, which a bias reads."""
    wide = x_NI.detach().to("cpu", torch.float64)
    return torch.cat((wide, torch.ones(len(wide), 1, dtype=torch.float64)), 1)


class Pairs:
    """Second moments of what is read and what should be given, each token with a weight.

    Both sides carry a 1 at the end, so that the last row and column are sums.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.read = torch.zeros(())  # Σ w y yᵀ
        self.cross = torch.zeros(())  # Σ w y tᵀ
        self.wanted = torch.zeros(())  # Σ w t tᵀ

    def add(self, y_NI: Tensor, t_NO: Tensor, weight_N: Tensor | None = None) -> None:
        """Count more tokens.

        Args:
            y_NI: what is read.
            t_NO: what should be given, or what the parent read.
            weight_N: how much each token counts; 1 where left out.
        """
        y, t = with_one(y_NI), with_one(t_NO)
        left = y if weight_N is None else y * weight_N.to("cpu", torch.float64)[:, None]
        self.tokens += len(y)
        self.read = self.read + left.T @ y
        self.cross = self.cross + left.T @ t
        right = t if weight_N is None else t * weight_N.to("cpu", torch.float64)[:, None]
        self.wanted = self.wanted + right.T @ t

    def through(self, weight_OP: Tensor, bias_O: Tensor | None) -> Pairs:
        """The pairs whose wanted side is `weight` times what it was: a parent's linear layer on what it read."""
        rows = weight_OP.shape[0] + 1
        map_PO = torch.zeros(weight_OP.shape[1] + 1, rows, dtype=torch.float64)
        map_PO[:-1, :-1] = weight_OP.T
        map_PO[-1, -1] = 1.0
        if bias_O is not None:
            map_PO[-1, :-1] = bias_O
        out = Pairs()
        out.tokens, out.read = self.tokens, self.read
        out.cross, out.wanted = self.cross @ map_PO, map_PO.T @ self.wanted @ map_PO
        return out


@dataclass(frozen=True)
class Linear:
    """A linear layer's weights, out × in, and its bias where it has one."""

    weight: Tensor
    bias: Tensor | None

    def design(self) -> Tensor:
        """Input and 1 → output, (in + 1) × out, or in × out where there is no bias."""
        return self.weight.T if self.bias is None else torch.cat((self.weight.T, self.bias[None]))

    def missed(self, pairs: Pairs) -> float:
        """The share of the wanted side that this layer does not give: squares about the mean where it has a bias."""
        design, inputs = self.design(), self._inputs(pairs)
        read, cross = pairs.read[:inputs, :inputs], pairs.cross[:inputs, :-1]
        wanted = pairs.wanted.diagonal()[:-1].sum()
        error = wanted - 2 * (design * cross).sum() + (design * (read @ design)).sum()
        total = wanted
        if self.bias is not None:
            total = wanted - pairs.wanted[:-1, -1].square().sum() / pairs.wanted[-1, -1].clamp_min(1e-300)
        return float(error.clamp_min(0) / total.clamp_min(1e-300))

    def fits(self, pairs: Pairs, ridges: Sequence[float] = RIDGES) -> Iterator[Linear]:
        """This layer fitted to the pairs, once for each ridge, a share of the inputs' mean square."""
        inputs = self._inputs(pairs)
        read, cross = pairs.read[:inputs, :inputs], pairs.cross[:inputs, :-1]
        design = self.design()
        gap = cross - read @ design
        size = pairs.read.diagonal()[:-1].mean()
        if not float(size) > 0:  # nothing was read, so nothing can be said
            return
        held = torch.ones(inputs, dtype=torch.float64) * size
        if self.bias is not None:
            held[-1] = 1e-6 * size
        # Σ + λH with H diagonal: one eigendecomposition serves every λ.
        root = held.rsqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * read * root)
        turned = vectors.T @ (root[:, None] * gap)
        for ridge in ridges:
            step = root[:, None] * (vectors @ (turned / (values.clamp_min(0) + ridge)[:, None]))
            yield self._moved(design + step)

    def _inputs(self, pairs: Pairs) -> int:
        return len(pairs.read) - (self.bias is None)

    def _moved(self, design: Tensor) -> Linear:
        if self.bias is None:
            return Linear(design.T, None)
        return Linear(design[:-1].T, design[-1])


def best(start: Linear, fitted_on: Pairs, held: Pairs) -> tuple[Linear, float, float]:
    """The fit that misses least of the text held out, and what the start and it miss."""
    before = after = start.missed(held)
    chosen = start
    for candidate in start.fits(fitted_on):
        missed = candidate.missed(held)
        if missed < after:
            chosen, after = candidate, missed
    return chosen, before, after


@dataclass(frozen=True)
class Gain:
    """A norm's weight and its bias where it has one."""

    weight: Tensor
    bias: Tensor | None


def fit_gain(start: Gain, pairs: Pairs, gram: Tensor, reading: Tensor, ridge: float = 1e-6) -> Gain:
    """A norm's weight γ' and bias β' that make what is read off the norm nearest to what was read off the parent's.

    The reader's outputs are `R'(γ'∘z + β')` and should be `R x`; squared over the text that is a quadratic form in
    γ' and β' with the matrix (R'ᵀR') ∘ E[z zᵀ].

    Args:
        pairs: z, what the norm gives before its weight and bias, and x.
        gram: R'ᵀR', new × new.
        reading: R'ᵀR, new × old.
        ridge: towards the start, as a share of the quadratic form's mean.
    """
    width = len(gram)
    zz, sums, count = pairs.read[:-1, :-1], pairs.read[:-1, -1], pairs.read[-1, -1]
    quadratic, linear = gram * zz, (reading * pairs.cross[:-1, :-1]).sum(1)
    begun = start.weight
    if start.bias is not None:
        mixed = gram * sums[:, None]
        quadratic = torch.cat((torch.cat((quadratic, mixed), 1), torch.cat((mixed.T, gram * count), 1)))
        linear = torch.cat((linear, reading @ pairs.cross[-1, :-1]))
        begun = torch.cat((start.weight, start.bias))
    held = ridge * quadratic.diagonal().mean().clamp_min(1e-300) * torch.eye(len(quadratic), dtype=torch.float64)
    fitted = begun + torch.linalg.solve(quadratic + held, linear - quadratic @ begun)
    return Gain(fitted[:width], None if start.bias is None else fitted[width:])


def gain_error(gain: Gain, pairs: Pairs, gram: Tensor, reading: Tensor) -> float:
    """What `fit_gain` makes small, but for a constant that no weight changes; arguments as there."""
    zz, sums, count = pairs.read[:-1, :-1], pairs.read[:-1, -1], pairs.read[-1, -1]
    weight = gain.weight
    error = weight @ (gram * zz) @ weight - 2 * (weight[:, None] * reading * pairs.cross[:-1, :-1]).sum()
    if gain.bias is not None:
        error = error + 2 * (weight * sums) @ gram @ gain.bias + count * (gain.bias @ gram @ gain.bias)
        error = error - 2 * gain.bias @ (reading @ pairs.cross[-1, :-1])
    return float(error)
