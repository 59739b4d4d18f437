"""What an operation works on: an architecture and its tensors, changed together.

Operations compute in float64 and hand back float64 tensors; `State.cast` turns them into the model's type
once, at the end, so that no step rounds what the next one reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.blueprint import Parameter, stored
from lathe.reshape.spill import Tensors


@dataclass(frozen=True)
class State:
    """An architecture and the tensors that its blueprint asks for."""

    architecture: Architecture
    tensors: Mapping[str, Tensor]

    def wide(self, name: str) -> Tensor:
        """One tensor in float64, on the CPU."""
        return self.tensors[name].detach().to("cpu", torch.float64)

    def parameters(self) -> tuple[Parameter, ...]:
        """The blueprint's stored parameters."""
        return stored(self.architecture)

    def along(self, group: str) -> Iterator[tuple[Parameter, int]]:
        """Every stored parameter that has an axis of `group`, and which of its dimensions that is."""
        for parameter in self.parameters():
            for dim, axis in enumerate(parameter.axes):
                if axis.group == group:
                    yield parameter, dim

    def with_(self, tensors: Mapping[str, Tensor], changes: Mapping[str, Any] | None = None) -> State:
        """A copy with some tensors replaced and some sizes changed."""
        architecture = self.architecture.with_(changes) if changes else self.architecture
        made = self.copied()
        made |= tensors
        return State(architecture, made)

    def blank(self) -> Tensors:
        """A place for an operation's tensors: in memory, or on the disk where the state itself is streamed."""
        return Tensors(self.tensors.folder if isinstance(self.tensors, Tensors) else None)

    def copied(self) -> Tensors:
        """The state's tensors, to be added to; none is read."""
        made = self.blank()
        made |= self.tensors
        return made

    def cast(self, dtype: torch.dtype) -> State:
        """Every tensor as `dtype`, contiguous, exactly those that the blueprint asks for, shapes checked."""
        shapes = {parameter.name: parameter.shape for parameter in self.parameters()}

        def as_asked(name: str, tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) != shapes[name]:
                raise AssertionError(f"{name} is {tuple(tensor.shape)}, the blueprint says {shapes[name]}")
            return tensor.to(dtype).contiguous()

        if isinstance(self.tensors, Tensors) and self.tensors.folder is not None:
            return State(self.architecture, self.tensors.chosen(shapes, as_asked))  # cast when read
        return State(self.architecture, {name: as_asked(name, self.tensors[name]) for name in shapes})


# In `Step.measures`: what follows is what the numbers named `before` and `after` are, which stand for the whole step.
ENDS = "; before and after it, "


@dataclass(frozen=True)
class Step:
    """One operation that was carried out.

    Args:
        name: what was done, such as "rotate d_model 512 → 384".
        exact: whether it leaves every output as it was, up to rounding.
        detail: measured facts about it, such as the retained energy per norm.
        measures: what the numbers in `detail` are, in words.
        note: what else is worth knowing about it, as a sentence.
    """

    name: str
    exact: bool
    detail: Mapping[str, float]
    measures: str = ""
    note: str = ""


_BLOCK = 2**22  # numbers


def blocks(tensor: Tensor) -> Iterator[slice]:
    """The rows of a tensor, as many at a time as make a copy of them in float64 small (32 MiB)."""
    rows = max(_BLOCK // max(tensor[:1].numel(), 1), 16)
    for start in range(0, len(tensor), rows):
        yield slice(start, min(start + rows, len(tensor)))


def multiply(tensor: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """`tensor` with `matrix` (size × new size) applied along dimension `dim`, in float64 on the CPU.

    A matrix' rows go block by block, so that of a table in another type no second whole copy is made.
    """
    if tensor.dim() != 2:
        return (tensor.detach().to("cpu", torch.float64).movedim(dim, -1) @ matrix).movedim(-1, dim)
    if dim == 0:
        return matrix.T @ tensor.detach().to("cpu", torch.float64)
    out = torch.empty(len(tensor), matrix.shape[1], dtype=torch.float64)
    for some in blocks(tensor):
        torch.matmul(tensor[some].detach().to("cpu", torch.float64), matrix, out=out[some])
    return out
