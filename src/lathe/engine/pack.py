"""Weights as the native step reads them: float32 where PyTorch has them, or packed once into panels of codes.

A packed panel holds 32 outputs. Four inputs of an output stand side by side as unsigned bytes, then those of the next
output, so one 64-byte load feeds one instruction that multiplies and adds 64 of them (`native/kernels_whole.h`). Codes
of 4 bits stand two to a byte, an input and the one four after it.

A quantised layer (`lathe.model.quantized`) keeps its codes, and what is said about its inputs: with int8 activations
they are rounded as it rounds them, without they are taken as they are and each panel is made numbers again on its way
through the cache. A float layer is quantised here where a precision asks for it: int8 with a scale an output, int4
with one (a bfloat16) for 32 weights that stand beside each other; both with int8 activations.

Shape suffixes: O outputs, I inputs, G groups, P panels, K steps of inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lathe.engine import layout, native
from lathe.engine.layout import PANEL, Linear
from lathe.model.quantized import Quantized, QuantizedLinear


class Unsupported(Exception):
    """What the native step cannot hold; the message says what and why."""


def empty_bytes(count: int) -> Tensor:
    """Memory that nobody has touched yet, in large pages where the system gives them."""
    made = torch.empty(count, dtype=torch.uint8)
    native.library().lathe_advise(made.data_ptr(), count)
    return made


def plain(tensor: Tensor, name: str) -> Tensor:
    """The tensor, if the native step can read it where it is.

    Raises:
        Unsupported: it is on a device, of another type than float32, or not in one piece.
    """
    if tensor.device.type != "cpu":
        raise Unsupported(f"{name} is on {tensor.device}: the native step runs on the CPU")
    if tensor.dtype != torch.float32:
        raise Unsupported(f"{name} is {tensor.dtype}: the native step reads float32")
    if not tensor.is_contiguous():
        raise Unsupported(f"{name} is not contiguous")
    return tensor.detach()


def linear(name: str, module: nn.Module, precision: str, threads: int) -> tuple[Linear, list[Tensor]]:
    """A linear layer as the native step reads it, and the tensors that have to live as long.

    Args:
        precision: what a float layer is stored as: `float32`, `int8` or `int4`.

    Raises:
        Unsupported: a layer of another kind.
    """
    if type(module) not in (nn.Linear, QuantizedLinear):
        raise Unsupported(f"{name} is a {type(module).__name__}: the native step reads plain and quantised layers")
    assert isinstance(module, nn.Linear | QuantizedLinear)
    bias_O = None if module.bias is None else plain(module.bias, f"{name}'s bias")
    if isinstance(module, QuantizedLinear):
        return quantized(module, bias_O)
    return matrix(plain(module.weight, name), bias_O, precision, threads)


def matrix(weight_OI: Tensor, bias_O: Tensor | None, precision: str, threads: int) -> tuple[Linear, list[Tensor]]:
    """A float matrix at a precision."""
    if precision == "float32":
        made = Linear(layout.FLOAT, *weight_OI.shape, weight_OI.shape[1], 0)
        return _filled(made, weight_OI, None, None, bias_O)
    if precision == "int8":
        return _bytes_of(weight_OI, bias_O, threads)
    return _nibbles_of(weight_OI, bias_O, threads)


def quantized(layer: Quantized, bias_O: Tensor | None) -> tuple[Linear, list[Tensor]]:
    """The codes of a quantised matrix in panels."""
    codes_OI, step = layer.codes_OI(), 4 if layer.bits == 8 else _NIBBLES
    group = layer.group_size or layer.in_features + -layer.in_features % step
    if group % step:  # of narrow layers alone, whose numbers cost little
        return matrix(layer.dequantized().float(), bias_O, "float32", 1)
    exact = layer.activations == "none"
    half = 2 ** (layer.bits - 1)
    scales_OG = layer.scales_OG.float()
    zeros_OG = torch.zeros_like(scales_OG) if layer.zeros_OG is None else layer.zeros_OG.float()
    made = Linear(layout.BYTE if layer.bits == 8 else layout.NIBBLE, *codes_OI.shape, group, int(exact))
    return _filled(made, _panels(codes_OI, layer.bits), _by_panel(scales_OG), _by_panel(zeros_OG + half), bias_O)


_NIBBLES = 8  # inputs that a panel of 4 bits holds side by side
_GROUP = 32  # inputs that share a scale where a float matrix is made int4


def _bytes_of(weight_OI: Tensor, bias_O: Tensor | None, threads: int) -> tuple[Linear, list[Tensor]]:
    """A float matrix as int8, each output by its own largest magnitude."""
    outputs, inputs = weight_OI.shape
    panels = -(-outputs // PANEL)
    codes = empty_bytes(panels * -(-inputs // 4) * PANEL * 4)
    scales = torch.empty(panels * PANEL)
    native.library().lathe_pack_bytes(
        weight_OI.data_ptr(), weight_OI.stride(0), outputs, inputs, codes.data_ptr(), scales.data_ptr(), threads
    )
    return _filled(Linear(layout.BYTE, outputs, inputs, inputs, 0), codes, scales, None, bias_O)


def _nibbles_of(weight_OI: Tensor, bias_O: Tensor | None, threads: int) -> tuple[Linear, list[Tensor]]:
    """A float matrix as int4: in each group the number of largest magnitude becomes -8."""
    outputs, inputs = weight_OI.shape
    panels = -(-outputs // PANEL)
    codes = empty_bytes(panels * -(-inputs // _NIBBLES) * PANEL * 4)
    scales = torch.empty(panels * -(-inputs // _GROUP) * PANEL, dtype=torch.bfloat16)
    native.library().lathe_pack_nibbles(
        weight_OI.data_ptr(), weight_OI.stride(0), outputs, inputs, codes.data_ptr(), scales.data_ptr(), threads
    )
    made = Linear(layout.NIBBLE, outputs, inputs, _GROUP, 0)
    made.short_scales = scales.data_ptr()
    made, held = _filled(made, codes, None, None, bias_O)
    return made, [*held, scales]


def _panels(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes, O × I, as panels of bytes."""
    outputs, inputs = codes_OI.shape
    step = 4 if bits == 8 else _NIBBLES
    raised_OI = codes_OI.view(torch.uint8) + 2 ** (bits - 1)  # whole numbers of 8 bits start over past 255
    raised_OI = F.pad(raised_OI, (0, -inputs % step, 0, -outputs % PANEL))
    each_POK = raised_OI.view(-1, PANEL, raised_OI.shape[1] // step, step)
    if bits == 4:
        each_POK = each_POK[..., :4] | (each_POK[..., 4:] << 4)
    made = empty_bytes(each_POK.numel())
    words_PKO = each_POK.contiguous().view(torch.int32)[..., 0].transpose(1, 2)
    made.view(torch.int32).view(words_PKO.shape).copy_(words_PKO)
    return made


def _by_panel(numbers_OG: Tensor) -> Tensor:
    """Scales or zeros, O × G, as panels × G × 32."""
    whole_OG = F.pad(numbers_OG, (0, 0, 0, -len(numbers_OG) % PANEL))
    return whole_OG.view(-1, PANEL, numbers_OG.shape[1]).transpose(1, 2).contiguous()


def _filled(
    made: Linear, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None
) -> tuple[Linear, list[Tensor]]:
    for name, tensor in (("weight", weight), ("scales", scales), ("zeros", zeros), ("bias", bias)):
        setattr(made, name, None if tensor is None else tensor.data_ptr())
    return made, [each for each in (weight, scales, zeros, bias) if each is not None]
