"""Whether two programs compute the same: what both are shown, and how far apart their answers are.

Both are given the same rows of token ids, drawn over the whole vocabulary, of different lengths so that padding and
positions count. The distance is measured against the outputs' own spread: the root mean square of the difference over
the standard deviation of the model's outputs. Rounding is a small share of it, a transposed or misplaced weight is
around one or more, and a model with large logits is held to the same measure as one with small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import LatheError
from lathe.model.transformer import Transformer

LENGTHS = (5, 16, 11)


@dataclass(frozen=True)
class Difference:
    """How far one set of outputs is from another.

    Args:
        max_error: the largest difference of one number.
        relative_error: the root mean square difference, as a share of the outputs' standard deviation.
        agreement: the share of places at which the largest output is the same one.
        places: how many places (tokens, or texts for a classifier) were compared.
    """

    max_error: float
    relative_error: float
    agreement: float
    places: int


def compare(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """The difference of outputs: of each row a tensor of places × numbers.

    Raises:
        LatheError: outputs of another shape, or numbers that are none.
    """
    shapes = [tuple(each.shape) for each in wanted], [tuple(each.shape) for each in found]
    if shapes[0] != shapes[1]:
        raise LatheError(f"what was written computes outputs of {shapes[1][:1]} where the model's are {shapes[0][:1]}")
    one, other = (torch.cat([row.detach().float() for row in rows]) for rows in (wanted, found))
    if not bool(torch.isfinite(other).all()):
        raise LatheError("what was written computes numbers that are not finite")
    error = (other - one).abs()
    spread = float(one.std()) if one.numel() > 1 else 0.0
    return Difference(
        max_error=float(error.max()),
        relative_error=float(error.square().mean().sqrt()) / max(spread, 1e-12),
        agreement=float((one.argmax(-1) == other.argmax(-1)).float().mean()),
        places=len(one),
    )


def probe(architecture: Architecture, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Rows of ids to show both programs, no padding token among them.

    None is longer than the model's positions, nor than a window, past which the programs do not all follow.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = [limit for _, stack in architecture.stacks for limit in (stack.positions.limit, stack.attention.window)]
    longest = min((limit for limit in limits if limit is not None), default=max(lengths))
    vocab, pad = architecture.embedding.vocab_size, architecture.tokens.pad
    rows = []
    for length in lengths:
        row = torch.randint(0, vocab, (min(length, longest),), generator=generator)
        if pad is not None and vocab > 1:
            row = torch.where(row == pad, torch.full_like(row, (pad + 1) % vocab), row)
        rows.append(row)
    return rows


def reference(architecture: Architecture, tensors: dict[str, Tensor]) -> Transformer:
    """The model itself in float32, for comparison; it shares the tensors' memory."""
    model = Transformer(architecture, device="meta")
    model.load_state_dict(tensors, assign=True)
    return model.eval()
