"""Weights as the native step reads them: float32 where PyTorch has them, or packed once into panels of whole numbers.

A packed panel holds 32 outputs. Four inputs of an output stand side by side as unsigned bytes, then those of the next
output, so one 64-byte load feeds one instruction that multiplies and adds 64 of them (`native/kernels_whole.h`). int8
has one scale an output, the largest magnitude over 127.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lathe.engine import layout, native
from lathe.engine.layout import PANEL, Linear


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


def float_linear(weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Linear, list[Tensor]]:
    """A float32 matrix, read where it is; and the tensors that have to live as long."""
    outputs, inputs = weight_OI.shape
    made = Linear(layout.FLOAT, outputs, inputs, 0, weight_OI.data_ptr(), None, None, _pointer(bias_O))
    return made, [each for each in (weight_OI, bias_O) if each is not None]


def byte_linear(weight_OI: Tensor, bias_O: Tensor | None, threads: int) -> tuple[Linear, list[Tensor]]:
    """A float32 matrix as int8, each output with its own scale; and the tensors that have to live as long."""
    outputs, inputs = weight_OI.shape
    panels = -(-outputs // PANEL)
    codes = empty_bytes(panels * -(-inputs // 4) * PANEL * 4)
    scales = torch.empty(panels * PANEL)
    native.library().lathe_pack_bytes(
        weight_OI.data_ptr(), weight_OI.stride(0), outputs, inputs, codes.data_ptr(), scales.data_ptr(), threads
    )
    made = Linear(layout.BYTE, outputs, inputs, 0, codes.data_ptr(), scales.data_ptr(), None, _pointer(bias_O))
    return made, [each for each in (codes, scales, bias_O) if each is not None]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(name: str, module: nn.Module, precision: str, threads: int) -> tuple[Linear, list[Tensor]]:
    """A linear layer as the native step reads it.

    Raises:
        Unsupported: a layer of another kind.
    """
    if type(module) is not nn.Linear:
        raise Unsupported(f"{name} is a {type(module).__name__}: the native step reads plain linear layers")
    weight_OI = plain(module.weight, name)
    bias_O = None if module.bias is None else plain(module.bias, f"{name}'s bias")
    return matrix(weight_OI, bias_O, precision, threads)


def matrix(weight_OI: Tensor, bias_O: Tensor | None, precision: str, threads: int) -> tuple[Linear, list[Tensor]]:
    """A matrix at a precision: `float32` or `int8`."""
    if precision == "float32":
        return float_linear(weight_OI, bias_O)
    return byte_linear(weight_OI, bias_O, threads)
