"""Linear layers and token tables that hold codes; drop-ins for `nn.Linear` and `TokenTable` in the one transformer.

*Weight-only.* The codes are made numbers again, and the product is the usual one: what is saved is memory, and the
reading of it.

*Dynamic int8 activations* (LLM.int8(), Dettmers et al. 2022, §2.1, without its outliers; ZeroQuant, Yao et al. 2022,
§3.2). Each token's vector is divided by its own scale and rounded to int8 as well, so the product is one of whole
numbers (`torch._int_mm`), summed in int32 without any error, and scaled once at the end: y = sₓ · s · (q_x · q). The
scale of a token is its largest magnitude over 127.5, as `compressed-tensors` takes it, so that `transformers` computes
the same from the same files.

The backward pass goes to the input alone: through the matrix that the codes stand for, made again when it is needed,
as QLoRA does (Dettmers et al. 2023, §3). Rounding of activations counts as if it were not there. Codes and scales are
buffers: nothing here is trained but a bias, and adapters on top.

Shape suffixes: N tokens, O outputs, I inputs, G groups in a row; V vocabulary, E width of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.model.codes import Codes, dequantize, pack, unpack

_INT8_RANGE = 127.5  # half of the distance from −128 to 127


class Quantized(nn.Module):
    """A matrix in codes; what `QuantizedLinear` and `QuantizedEmbedding` have in common.

    Args:
        matrix: the codes and scales, used as they are.

    Attributes:
        bits: 8 or 4.
        activations: `none`, or `int8` for products with int8 inputs.
        group_size: weights of a row that share a scale; 0 where all do.
        codes: int8, O × I; for 4 bits int32, packed eight to a word (`lathe.model.codes`).
        scales_OG: floating point, O × G.
        zeros_OG: int8, O × G; None for symmetric codes.
    """

    def __init__(self, matrix: Codes) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.codes_OI.shape
        self.bits, self.group_size = matrix.bits, matrix.group_size
        self.activations = matrix.activations
        self.codes: Tensor
        self.scales_OG: Tensor
        self.zeros_OG: Tensor | None
        self.register_buffer("codes", matrix.codes_OI if matrix.bits == 8 else pack(matrix.codes_OI, 4))
        self.register_buffer("scales_OG", matrix.scales_OG)
        self.register_buffer("zeros_OG", matrix.zeros_OG)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the scales, which is that of the stream."""
        return self.scales_OG.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, the scales and the zeros."""
        return sum(each.nbytes for each in (self.codes, self.scales_OG, self.zeros_OG) if each is not None)

    def codes_OI(self) -> Tensor:
        """The codes one by one, int8, O × I; those of 4 bits are unpacked at each call."""
        return self.codes if self.bits == 8 else unpack(self.codes, self.in_features, 4)

    def matrix(self) -> Codes:
        """Codes, scales and zeros as one value."""
        return Codes(self.codes_OI(), self.scales_OG, self.zeros_OG, self.bits, self.activations)

    def dequantized(self) -> Tensor:
        """The matrix that the codes stand for, O × I, made anew at each call."""
        return dequantize(self.codes_OI(), self.scales_OG, self.zeros_OG)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of that matrix, … × I."""
        flat = ids.reshape(-1)
        codes_NI = self.codes[flat] if self.bits == 8 else unpack(self.codes[flat], self.in_features, 4)
        zeros_NG = None if self.zeros_OG is None else self.zeros_OG[flat]
        return dequantize(codes_NI, self.scales_OG[flat], zeros_NG).view(*ids.shape, self.in_features)

    def product(self, x: Tensor) -> Tensor:
        """Each vector's product with every row, … × O."""
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return out
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.activations == "int8":
            return self._whole_product(x)
        if self.bits == 8 and self.group_size == 0 and self.zeros_OG is None:
            # The scale of a row may as well wait until the product is there.
            return F.linear(x, self.codes.to(x.dtype)) * self.scales_OG.view(-1)
        return F.linear(x, self.dequantized())

    def _whole_product(self, x: Tensor) -> Tensor:
        x_NI = x.reshape(-1, self.in_features)
        codes_NI, scales_N1 = quantize_tokens(x_NI)
        out_NO = whole_product(codes_NI, self.codes).to(torch.float32) * scales_N1 * self.scales_OG.view(-1)
        return out_NO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        group = f", group_size={self.group_size}" if self.group_size else ""
        zeros = "" if self.zeros_OG is None else ", asymmetric"
        return (
            f"{self.in_features} → {self.out_features}, {self.bits} bits{group}{zeros}, activations={self.activations}"
        )


class QuantizedLinear(Quantized):
    """`nn.Linear` with its weight in codes; the bias, where there is one, stays as it was."""

    def __init__(self, matrix: Codes, bias: nn.Parameter | None = None) -> None:
        super().__init__(matrix)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        """… × I to … × O."""
        out = self.product(input)
        return out if self.bias is None else out + self.bias


class QuantizedEmbedding(Quantized):
    """The token table in codes: rows on the way in and, when tied, a product with all of them on the way out."""

    def forward(self, ids: Tensor) -> Tensor:
        """Token vectors, … × E."""
        return self.rows(ids)

    def logits(self, hidden_BTE: Tensor, bias_V: Tensor | None = None) -> Tensor:
        """Each hidden state's product with every row, B × T × V."""
        out = self.product(hidden_BTE)
        return out if bias_V is None else out + bias_V


def quantize_tokens(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector in int8 and its scale: codes N × I, scales N × 1 in float32."""
    wide = x_NI.to(torch.float32)
    scales_N1 = wide.abs().amax(dim=-1, keepdim=True) / _INT8_RANGE
    # A vector of zeros has any scale.
    scales_N1 = torch.where(scales_N1 == 0, torch.finfo(torch.float32).eps, scales_N1)
    return (wide / scales_N1).round_().clamp_(-128, 127).to(torch.int8), scales_N1


def whole_product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """The product of two matrices of int8, N × O: int32 where the device has such a product, float32 elsewhere."""
    if x_NI.device.type == "cpu":
        return torch._int_mm(x_NI, weight_OI.t())
    if x_NI.device.type != "cuda":
        return x_NI.to(torch.float32) @ weight_OI.to(torch.float32).t()
    # CUDA's wants more than 16 rows, and sides that eight divides.
    (rows, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    x_NI = F.pad(x_NI, (0, -inputs % 8, 0, max(32 - rows, -rows % 8)))
    weight_OI = F.pad(weight_OI, (0, -inputs % 8, 0, -outputs % 8))
    return torch._int_mm(x_NI, weight_OI.t())[:rows, :outputs]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantized().to(grads[0].dtype), None
