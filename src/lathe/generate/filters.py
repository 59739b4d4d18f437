"""Functions that change the next token's logits before it is chosen, in `transformers`' order.

A filter takes the logits of the next token, B × V, and how far the rows have come, and returns logits. What
may not be chosen becomes -inf. Sampling then draws from the softmax of what is left; greedy choice takes the
largest. A new one is a function here and a line in `pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.generate.settings import Settings


@dataclass(frozen=True)
class Progress:
    """How far the rows have come.

    Args:
        n_prompt: columns of the prompt.
        n_new: tokens added since.
        max_new: how many may be added.
    """

    n_prompt: int
    n_new: int
    max_new: int


Filter = Callable[[Tensor, Progress], Tensor]


def pipeline(settings: Settings) -> list[Filter]:
    """The filters that the settings ask for, in the order in which they are applied."""
    filters: list[Filter] = []
    ends, start, end = settings.eos_token_id, settings.forced_bos_token_id, settings.forced_eos_token_id
    if ends and (settings.min_new_tokens or settings.min_length):
        filters.append(
            lambda x, at: (
                ban(x, ends)
                if at.n_new < settings.min_new_tokens or at.n_prompt + at.n_new < settings.min_length
                else x
            )
        )
    if start is not None:
        filters.append(lambda x, at: force(x, start) if at.n_prompt + at.n_new == 1 else x)
    if end is not None:
        filters.append(lambda x, at: force(x, end) if at.n_new == at.max_new - 1 else x)
    if settings.do_sample:
        filters += _sampling(settings)
    return filters


def _sampling(settings: Settings) -> list[Filter]:
    filters: list[Filter] = []
    if settings.temperature != 1.0:
        filters.append(lambda x, _: temperature(x, settings.temperature))
    k = settings.top_k
    if k is not None:
        filters.append(lambda x, _: top_k(x, k))
    if settings.top_p < 1.0:
        filters.append(lambda x, _: top_p(x, settings.top_p))
    return filters


def temperature(logits_BV: Tensor, t: float) -> Tensor:
    """Logits over `t`: below 1 the likely become likelier, above 1 the unlikely do (Ackley et al. 1985, §2)."""
    return logits_BV / t


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest tokens, and those as likely as the last of them (Fan et al. 2018, §5.4)."""
    last_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < last_B1, -torch.inf)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities add up to `p`, the nucleus (Holtzman et al. 2020, §3.1)."""
    sorted_BV, order_BV = logits_BV.sort(descending=True)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV  # how much the likelier ones have
    dropped_BV = before_BV >= p
    dropped_BV[:, 0] = False
    return logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)


def ban(logits_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Rule out some tokens."""
    return logits_BV.index_fill(1, torch.tensor(ids, device=logits_BV.device), -torch.inf)


def force(logits_BV: Tensor, token: int) -> Tensor:
    """Rule out all tokens but one."""
    forced_BV = torch.full_like(logits_BV, -torch.inf)
    forced_BV[:, token] = 0.0
    return forced_BV
