"""How the next token is chosen from logits: the likeliest, or a draw that depends on the row alone.

A draw inverts the cumulative distribution at one number u from [0, 1): the first token at which the sum of
probabilities passes u. All of a row's numbers come from a generator of its own, drawn ahead, so neither the
other rows of the batch nor when they end changes what a row draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.settings import Settings

_MASK = 2**64 - 1


def numbers(
    settings: Settings, n_prompts: int, count: int, device: torch.device | str = "cpu", *, copies: int = 1
) -> Tensor:
    """The numbers from [0, 1) that the rows draw with, rows × `count`, float64 where the device has it.

    Row i of a single seed has a stream of its own, and so has each of a prompt's `copies` where every prompt has a
    seed. A prompt alone with a seed draws what it draws in a batch with that seed in its place.
    """
    seed = settings.seed
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, int):
        streams = [(seed, row) for row in range(n_prompts * copies)]
    elif len(seed) == n_prompts:
        streams = [(each, copy) for each in seed for copy in range(copies)]
    else:
        raise RequestError(f"{len(seed)} seeds for {n_prompts} prompts: expected one for each, or one number for all")
    wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.stack([_stream(*stream, count) for stream in streams]).to(wide).to(device)


def draw(logits_BV: Tensor, u_B: Tensor) -> Tensor:
    """A token a row, from the softmax of its logits; `u_B` are `numbers`."""
    sums_BV = logits_BV.to(u_B.dtype).softmax(dim=-1).cumsum(dim=-1)
    total_B1 = sums_BV[:, -1:]
    # Rounding may lift u times the total to the total itself, past the last token that has any chance.
    at_B1 = torch.minimum(u_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(sums_BV, at_B1, right=True)[:, 0]


def draw_several(scores_BV: Tensor, u_BN: Tensor) -> Tensor:
    """N different tokens a row, B × N, drawn one after the other from the softmax of what is left.

    Where fewer than N have any chance, they come first and others, which have none, fill up.
    """
    left_BV = scores_BV.to(u_BN.dtype).clone()
    taken_BV = torch.zeros_like(left_BV, dtype=torch.bool)
    found = []
    for place in range(u_BN.shape[1]):
        # A row where nothing with a chance is left draws among all that it has not taken.
        exhausted_B1 = left_BV.amax(dim=-1, keepdim=True).isneginf()
        from_BV = torch.where(exhausted_B1, torch.zeros_like(left_BV).masked_fill(taken_BV, -torch.inf), left_BV)
        found.append(draw(from_BV, u_BN[:, place]))
        taken_BV = taken_BV.scatter(1, found[-1][:, None], True)
        left_BV = left_BV.masked_fill(taken_BV, -torch.inf)
    return torch.stack(found, dim=1)


def _stream(seed: int, row: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(_mix(_mix(seed) ^ row))
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _mix(x: int) -> int:
    """Scatter a number over 64 bits (SplitMix64's finaliser, Steele et al. 2014), so that neighbours share nothing."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
