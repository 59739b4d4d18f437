"""A linear layer with adapters: W·x + s·B·(A·x), W frozen and B·A of low rank (LoRA, Hu et al. 2021, §4.1).

A is R × I and drawn at random, B is O × R and zero, so an untrained adapter changes nothing. s is alpha / R;
rsLoRA (Kalajdzievski 2023, §3) takes alpha / √R, which keeps what the update learns independent of R.

DoRA (Liu et al. 2024, §4) splits each row of the matrix into a length and a direction: m · V / ‖V‖ with
V = W + s·B·A, where the lengths m start at ‖W‖ and are trained too. ‖V‖ counts as a constant in the backward
pass (§4.3). It costs a product B·A and a norm of an O × I matrix at each forward.

A layer that is new (a classifier on a model that had none) has nothing that is worth freezing. `Whole` is an adapter of
such a layer: a matrix and a bias of its own, trained as they are, in place of the base's.

`LoraLinear` is an `nn.Linear`: its weight and bias keep the blueprint's names and are the very tensors of the
layer that it replaced. It may hold several adapters, of which one or none is active. Merging puts the folded
matrix in place of W and keeps W itself beside it, so unmerging gives W back bit for bit.

`LoraQuantized` is the same on a layer whose W is in codes (QLoRA, Dettmers et al. 2023, §3). W is made a matrix again
where its numbers are asked for, and nothing is merged into it: the sum would have to be rounded again.

Shape suffixes: O outputs, I inputs, R rank; the leading axes of an input are left to `…`.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.errors import RequestError
from lathe.model.quantized import QuantizedLinear


class Adapter(nn.Module):
    """One adapter of one layer.

    Args:
        down_RI: A. Adapters of fused layers (GPT-2's q, k and v) may hold the same one.
        up_OR: B.
        scale: s.
        dropout: the probability with which an input is dropped in training.
        rslora: whether s is written as alpha / √R; it changes no computation.
        magnitude_O: m; None for plain LoRA.
    """

    def __init__(
        self,
        down_RI: nn.Parameter,
        up_OR: nn.Parameter,
        *,
        scale: float,
        dropout: float = 0.0,
        rslora: bool = False,
        magnitude_O: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.down, self.up, self.magnitude = down_RI, up_OR, magnitude_O
        self.scale, self.rslora = scale, rslora
        # A number and no module: a run's own dropout is set on modules, and is not meant for adapters.
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def update(self) -> Tensor:
        """s·B·A, O × I."""
        return self.scale * (self.up @ self.down)

    def lengths(self, weight_OI: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each row, O; 1 where a row is zero, so that nothing is divided by zero."""
        with torch.no_grad():
            norm_O: Tensor = torch.linalg.vector_norm(weight_OI.to(self.up.dtype) + self.update(), dim=1)
            return norm_O.masked_fill(norm_O == 0, 1.0)

    def fold(self, weight_OI: Tensor) -> Tensor:
        """The one matrix that computes what W and the adapter compute, O × I in W's type."""
        with torch.no_grad():
            folded_OI = weight_OI.to(self.up.dtype) + self.update()
            if self.magnitude is not None:
                folded_OI = folded_OI * (self.magnitude / self.lengths(weight_OI))[:, None]
            return folded_OI.to(weight_OI.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor, base: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None) -> Tensor:
        """The layer's output with the adapter, … × O, from its input and what it gives without.

        Args:
            weight_OI: W, which DoRA alone asks for.
        """
        added = self.scale * F.linear(F.linear(self._dropped(x.to(self.down.dtype)), self.down), self.up)
        if self.magnitude is None:
            return base + added.to(base.dtype)
        assert weight_OI is not None
        product = base if bias_O is None else base - bias_O
        scaled = (self.magnitude / self.lengths(weight_OI)) * (product + added)
        return (scaled if bias_O is None else scaled + bias_O).to(base.dtype)


class Whole(nn.Module):
    """One adapter's own weight, O × I, and bias, O, of one layer."""

    def __init__(self, weight_OI: nn.Parameter, bias_O: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, … × O."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class Adapted(nn.Module):
    """A layer with adapters, by name: what `LoraLinear` and `LoraQuantized` have in common.

    `active` is the adapter that runs; a layer without one of that name computes as if it had none.
    """

    adapters: nn.ModuleDict
    active: str | None
    unmerged: Tensor | None  # W, while the folded matrix stands in its place

    @property
    def running(self) -> Adapter | Whole | None:
        """The adapter that `forward` adds, or None."""
        if self.active is None or self.unmerged is not None or self.active not in self.adapters:
            return None
        return self.adapter(self.active)

    def adapter(self, name: str) -> Adapter | Whole:
        """The adapter of that name; KeyError if there is none."""
        found = self.adapters[name]
        assert isinstance(found, Adapter | Whole)
        return found

    def forward(self, input: Tensor) -> Tensor:
        """… × O."""
        adapter = self.running
        if isinstance(adapter, Whole):
            whole: Tensor = adapter(input)
            return whole
        base: Tensor = super().forward(input)
        if adapter is None:
            return base
        weight_OI = None if adapter.magnitude is None else weight_of(self)
        out: Tensor = adapter(input, base, weight_OI, bias_of(self))
        return out

    def folded(self) -> Tensor:
        """The weight that computes what the layer now computes, O × I: W itself where no adapter runs."""
        adapter, weight_OI = self.running, weight_of(self).detach()
        if isinstance(adapter, Whole):
            return adapter.weight.detach().to(weight_OI.dtype)
        return weight_OI if adapter is None else adapter.fold(weight_OI)

    def folded_bias(self) -> Tensor | None:
        """The bias that goes with it, O."""
        adapter = self.running
        bias_O = adapter.bias if isinstance(adapter, Whole) else bias_of(self)
        return None if bias_O is None else bias_O.detach().to(dtype_of(self))


class LoraLinear(Adapted, nn.Linear):
    """A linear layer and its adapters."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.adapters = nn.ModuleDict()
        self.active = None
        self.unmerged_bias: Tensor | None
        self.register_buffer("unmerged", None, persistent=False)
        self.register_buffer("unmerged_bias", None, persistent=False)  # the bias, where it was merged as well

    @classmethod
    def around(cls, linear: nn.Linear) -> Self:
        """The layer with `linear`'s own weight and bias, and no adapter yet."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def plain(self) -> nn.Linear:
        """A linear layer with the weight and bias as they now are, and without adapters."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def merge(self) -> None:
        """Put the folded matrix in place of W; nothing happens where no adapter runs."""
        if self.running is None:
            return
        weight_OI, bias_O = self.folded(), self.folded_bias()
        if isinstance(self.running, Whole) and bias_O is not None:
            self.unmerged_bias = self.bias.detach().clone()
            self.bias.data.copy_(bias_O)
        self.unmerged = self.weight.detach().clone()
        self.weight.data.copy_(weight_OI)

    def unmerge(self) -> None:
        """Put W back, bit for bit."""
        if self.unmerged is not None:
            self.weight.data.copy_(self.unmerged)
            self.unmerged = None
        if self.unmerged_bias is not None:
            self.bias.data.copy_(self.unmerged_bias)
            self.unmerged_bias = None


class LoraQuantized(Adapted, QuantizedLinear):
    """A linear layer in codes and its adapters."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer.matrix(), layer.bias)
        self.adapters = nn.ModuleDict()
        self.active = None
        self.unmerged = None
        self.train(layer.training)

    def plain(self) -> QuantizedLinear:
        """The layer in codes, without adapters."""
        return QuantizedLinear(self.matrix(), self.bias).train(self.training)

    def merge(self) -> None:
        """Refuse: the matrix with the adapter in it is not one that codes stand for.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "cannot merge an adapter into a quantised model: it would be rounded again; merge it into the model as "
            "it was before, and quantise the result"
        )

    def unmerge(self) -> None:
        """Nothing: nothing is ever merged."""


def weight_of(layer: nn.Module) -> Tensor:
    """W of a linear layer, O × I; of one in codes, the matrix that they stand for."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantized()
    assert isinstance(layer, nn.Linear)
    return layer.weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a linear layer, O."""
    assert isinstance(layer, nn.Linear | QuantizedLinear)
    return layer.bias


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The type of a linear layer's numbers."""
    assert isinstance(layer, nn.Linear | QuantizedLinear)
    return layer.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype


def device_of(layer: nn.Module) -> torch.device:
    """Where a linear layer's numbers are."""
    assert isinstance(layer, nn.Linear | QuantizedLinear)
    return layer.device if isinstance(layer, QuantizedLinear) else layer.weight.device
