"""Least squares from moments: a matrix or a norm fitted to what it should give, without keeping what was seen.

A narrow model's linear layer reads y where its parent read x. The best weights for `W' y ≈ t` are
`W' = Σ_ty (Σ_yy + λI)⁻¹`, and a ridge λ towards the weights there are, W₀, makes that
`W' = W₀ + (Σ_ty − W₀ Σ_yy)(Σ_yy + λI)⁻¹`: where the text says nothing, W₀ stays, and where W₀ is right already,
nothing changes at all. A bias is one more input that is always 1, and has no ridge.

λ is chosen by text that was not fitted on: the fit that misses least of it wins, W₀ itself among the candidates.
Moments are float64, and as large as the layer is wide, however long the text. Outputs are fitted block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_MOST_NUMBERS = 2**22  # of a block of outputs: 32 MiB


def with_one(x_NI: Tensor) -> Tensor:
    """Rows in float64 with a 1 at their end, which a bias reads."""
    wide = x_NI.detach().to("cpu", torch.float64)
    return torch.cat((wide, torch.ones(len(wide), 1, dtype=torch.float64)), 1)


@dataclass(frozen=True)
class Layer:
    """A parent's linear layer, out × in: what is wanted is what it gives. Read block by block, in any dtype."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Wanted:
    """What some outputs should give, as sums over the tokens: one row of `cross` for each input.

    Args:
        cross: Σ w y tᵀ, (inputs + 1) × outputs.
        squares, sums: Σ w t² and Σ w t of each output.
        count: Σ w.
    """

    cross: Tensor
    squares: Tensor
    sums: Tensor
    count: Tensor


class Pairs:
    """Second moments of what is read and what should be given, each token with a weight.

    Both sides carry a 1 at the end, so that the last row and column are sums.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.read = torch.zeros(())  # Σ w y yᵀ
        self.cross = torch.zeros(())  # Σ w y tᵀ
        self.wanted = torch.zeros(())  # Σ w t tᵀ
        self.layer: Layer | None = None  # what is wanted is what it makes of t

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
        out = Pairs()
        out.tokens, out.read, out.cross, out.wanted = self.tokens, self.read, self.cross, self.wanted
        out.layer = Layer(weight_OP, bias_O)
        return out

    @property
    def outputs(self) -> int:
        """How many outputs are wanted."""
        return len(self.wanted) - 1 if self.layer is None else len(self.layer.weight)

    def asked(self, some: slice) -> Wanted:
        """What some of the outputs should give.

        A table's outputs are a vocabulary: all of them at once, and the products between them, would not fit.
        """
        if self.layer is None:
            squares = self.wanted.diagonal()[:-1]
            return Wanted(self.cross[:, some], squares[some], self.wanted[-1, some], self.wanted[-1, -1])
        weight = self.layer.weight[some].to("cpu", torch.float64)
        bias = self.layer.bias
        constant = weight.new_zeros(1, len(weight)) if bias is None else bias[some].to("cpu", torch.float64)[None]
        map_PO = torch.cat((weight.T, constant))
        given = self.wanted @ map_PO
        return Wanted(self.cross @ map_PO, (map_PO * given).sum(0), given[-1], self.wanted[-1, -1])


@dataclass(frozen=True)
class Linear:
    """A linear layer's weights, out × in, and its bias where it has one."""

    weight: Tensor
    bias: Tensor | None

    def design(self, some: slice) -> Tensor:
        """Input and 1 → some outputs, (in + 1) × outputs, or in × outputs where there is no bias."""
        weight = self.weight[some].T
        return weight if self.bias is None else torch.cat((weight, self.bias[None, some]))

    def missed(self, pairs: Pairs) -> float:
        """The share of the wanted side that this layer does not give: squares about the mean where it has a bias."""
        error = total = torch.zeros((), dtype=torch.float64)
        for some in self._blocks(pairs):
            asked = pairs.asked(some)
            error = error + self._error(self.design(some), pairs, asked)
            total = total + self._size(asked)
        return float(error.clamp_min(0) / total.clamp_min(1e-300))

    def fits(self, pairs: Pairs, ridges: Sequence[float] = RIDGES) -> Iterator[Linear]:
        """This layer fitted to the pairs, once for each ridge, a share of the inputs' mean square."""
        solver = _Solver.of(self, pairs)
        if solver is not None:
            for ridge in ridges:
                yield self._fitted(pairs, solver, ridge)

    def _fitted(self, pairs: Pairs, solver: _Solver, ridge: float) -> Linear:
        weight = torch.empty_like(self.weight)
        bias = None if self.bias is None else torch.empty_like(self.bias)
        for some in self._blocks(pairs):
            design = next(solver.moved(self.design(some), pairs.asked(some).cross, (ridge,)))
            weight[some] = design[: weight.shape[1]].T
            if bias is not None:
                bias[some] = design[-1]
        return Linear(weight, bias)

    def _blocks(self, pairs: Pairs) -> Iterator[slice]:
        """As many outputs at a time as can stand beside each other a few times."""
        many = max(_MOST_NUMBERS // len(pairs.read), 16)
        for start in range(0, pairs.outputs, many):
            yield slice(start, min(start + many, pairs.outputs))

    def _inputs(self, pairs: Pairs) -> int:
        return len(pairs.read) - (self.bias is None)

    def _error(self, design: Tensor, pairs: Pairs, asked: Wanted) -> Tensor:
        inputs = self._inputs(pairs)
        read, cross = pairs.read[:inputs, :inputs], asked.cross[:inputs]
        return asked.squares.sum() - 2 * (design * cross).sum() + (design * (read @ design)).sum()

    def _size(self, asked: Wanted) -> Tensor:
        if self.bias is None:
            return asked.squares.sum()
        return asked.squares.sum() - asked.sums.square().sum() / asked.count.clamp_min(1e-300)


@dataclass(frozen=True)
class _Solver:
    """Ridge regressions on the same inputs. Σ + λH with H diagonal: one eigendecomposition serves every λ."""

    read: Tensor
    root: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, linear: Linear, pairs: Pairs) -> _Solver | None:
        """None where nothing was read, so that nothing can be said."""
        inputs = linear._inputs(pairs)
        read = pairs.read[:inputs, :inputs]
        size = pairs.read.diagonal()[:-1].mean()
        if not float(size) > 0:
            return None
        held = torch.ones(inputs, dtype=torch.float64) * size
        if linear.bias is not None:
            held[-1] = 1e-6 * size
        root = held.rsqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * read * root)
        return cls(read, root, values.clamp_min(0), vectors)

    def moved(self, design: Tensor, cross: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
        """Some outputs' design, fitted with each ridge in turn."""
        gap = cross[: len(self.read)] - self.read @ design
        turned = self.vectors.T @ (self.root[:, None] * gap)
        for ridge in ridges:
            yield design + self.root[:, None] * (self.vectors @ (turned / (self.values + ridge)[:, None]))


def best(start: Linear, fitted_on: Pairs, held: Pairs) -> tuple[Linear, float, float]:
    """The fit that misses least of the text held out, and what the start and it miss."""
    solver = _Solver.of(start, fitted_on)
    ridges = () if solver is None else RIDGES
    errors = torch.zeros(1 + len(ridges), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for some in start._blocks(fitted_on):
        asked, design = held.asked(some), start.design(some)
        total = total + start._size(asked)
        errors[0] += start._error(design, held, asked)
        if solver is not None:
            moved = solver.moved(design, fitted_on.asked(some).cross, ridges)
            for place, candidate in enumerate(moved, start=1):
                errors[place] += start._error(candidate, held, asked)
    shares = (errors.clamp_min(0) / total.clamp_min(1e-300)).tolist()
    chosen = min(range(len(shares)), key=shares.__getitem__)
    if chosen == 0 or solver is None:
        return start, shares[0], shares[0]
    return start._fitted(fitted_on, solver, ridges[chosen - 1]), shares[0], shares[chosen]


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
