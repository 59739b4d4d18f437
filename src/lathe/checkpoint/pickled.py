"""Weights in PyTorch's pickle format (`pytorch_model.bin`): read, never written.

A pickle is a small program that builds objects, and it may call anything. PyTorch's restricted unpickler
(`weights_only=True`) builds tensors and plain containers and refuses the rest; nothing here has a way around
it. Since PyTorch 1.6 the file is a zip archive whose tensors can be mapped into memory; the older format
cannot, and is read whole: one copy in memory, where a mapped file needs none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lathe.checkpoint.layout import starts_with, unreadable
from lathe.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_ZIP_START = b"PK\x03\x04"  # by these bytes torch itself tells the two formats apart


def unpickle_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one pickled state dict by name, on the CPU, and whether they are views of the mapped file.

    Tied tensors share their memory.

    Raises:
        RequestError: the file is damaged, is not a state dict, or would run code.
    """
    try:
        mapped = starts_with(path, _ZIP_START)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes make an unpickler raise just about anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise RequestError(
                f"{path} holds more than tensors: reading it would call {refused[1]}, which Lathe never allows; "
                "if you trust the file, save it again as safetensors"
            ) from error
        raise unreadable(path, "PyTorch weights", error) from error
    if not isinstance(content, Mapping):
        raise RequestError(f"{path} holds {describe(content)}: expected a dictionary of name to tensor")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not is_dense(value):
            raise RequestError(
                f"{path}: {name!r} is {describe(value)}; expected a dictionary of name to dense tensor, as "
                "torch.save(model.state_dict(), …) writes it"
            )
        tensors[name] = value.detach()
    return tensors, mapped


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is plain memory: not sparse, not quantized, not without data."""
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def describe(value: object) -> str:
    """A value in the words of an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
    return f"an object of type {type(value).__name__}"
