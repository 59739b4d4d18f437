"""Functions that change the next token's logits before it is chosen, in `transformers`' order.

A filter takes the logits of the next token, B × V, and the rows' history, and returns logits. What may not be
chosen becomes -inf. Sampling then draws from the softmax of what is left; greedy choice takes the largest; beam
search adds them up, and so is given log-probabilities in place of logits. First come the filters that look at
the text (`lathe.generate.history`), then bans and forced tokens, then those that shape the distribution for a
draw. A new one is a function and a line in `pipeline`.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.generate import history
from lathe.generate.history import History
from lathe.generate.settings import Settings

# Logits over a smaller temperature may be too large for a number.
_COLD = 1e-30


@dataclass(frozen=True)
class Filter:
    """A change of logits, under the name of the setting that asks for it."""

    name: str
    change: Callable[[Tensor, History], Tensor]

    def __call__(self, logits_BV: Tensor, at: History) -> Tensor:
        return self.change(logits_BV, at)


def pipeline(settings: Settings) -> list[Filter]:
    """The filters that the settings ask for, in the order in which they are applied."""
    found = [*_of_the_text(settings), *_bans(settings)]
    if settings.do_sample:
        found += _sampling(settings)
    if settings.renormalize_logits:
        found.append(Filter("renormalize_logits", lambda x, _: x.log_softmax(dim=-1)))
    return found


def _of_the_text(settings: Settings) -> list[Filter]:
    neutral = Settings()
    table: tuple[tuple[str, Callable[..., Tensor]], ...] = (
        ("encoder_repetition_penalty", history.encoder_repetition),
        ("repetition_penalty", history.repetition),
        ("presence_penalty", history.presence),
        ("frequency_penalty", history.frequency),
        ("no_repeat_ngram_size", history.repeated_ngrams),
        ("encoder_no_repeat_ngram_size", history.source_ngrams),
    )
    return [
        _filter(name, change, settings) for name, change in table if getattr(settings, name) != getattr(neutral, name)
    ]


def _filter(name: str, change: Callable[..., Tensor], settings: Settings) -> Filter:
    value = getattr(settings, name)
    return Filter(name, lambda x, at: change(x, at, value))


def _bans(settings: Settings) -> list[Filter]:
    found: list[Filter] = []
    ends, start, end = settings.eos_token_id, settings.forced_bos_token_id, settings.forced_eos_token_id
    least, least_new = settings.min_length, settings.min_new_tokens
    never, not_first = settings.suppress_tokens, settings.begin_suppress_tokens
    # A ban of the end token alone is what min_length is for; `transformers` passes it over too.
    words = [word for word in settings.bad_words_ids or () if len(word) > 1 or word[0] not in ends]
    if words:
        found.append(Filter("bad_words_ids", lambda x, at: history.bad_words(x, at, words)))
    if ends and least:
        found.append(Filter("min_length", lambda x, at: ban(x, ends) if at.columns + at.n_new < least else x))
    if ends and least_new:
        found.append(Filter("min_new_tokens", lambda x, at: ban(x, ends) if at.n_new < least_new else x))
    if start is not None:
        found.append(
            Filter("forced_bos_token_id", lambda x, at: force(x, (start,)) if at.columns + at.n_new == 1 else x)
        )
    if end is not None:
        last = end if isinstance(end, tuple) else (end,)
        found.append(Filter("forced_eos_token_id", lambda x, at: force(x, last) if at.n_new == at.max_new - 1 else x))
    if never:
        found.append(Filter("suppress_tokens", lambda x, _: ban(x, never)))
    if not_first:
        found.append(Filter("begin_suppress_tokens", lambda x, at: ban(x, not_first) if _at_start(at, start) else x))
    return found


def _at_start(at: History, forced: int | None) -> bool:
    """Whether the first free token is next: the one after a forced one, where there is."""
    return at.n_new == (1 if forced is not None and at.columns == 1 else 0)


def _sampling(settings: Settings) -> list[Filter]:
    found: list[Filter] = []
    # A beam needs a token to go on with where every likelier one ends it.
    keep = 1 if settings.num_beams == 1 else max(2, len(settings.eos_token_id) + 1)
    k, least = settings.top_k, settings.min_p
    if settings.temperature != 1.0:
        found.append(Filter("temperature", lambda x, _: temperature(x, settings.temperature)))
    if k is not None:
        found.append(Filter("top_k", lambda x, _: top_k(x, max(k, keep))))
    if settings.top_p < 1.0:
        found.append(Filter("top_p", lambda x, _: top_p(x, settings.top_p, keep)))
    if least is not None:
        found.append(Filter("min_p", lambda x, _: min_p(x, least, keep)))
    if settings.typical_p < 1.0:
        found.append(Filter("typical_p", lambda x, _: typical_p(x, settings.typical_p, keep)))
    if settings.epsilon_cutoff > 0.0:
        found.append(Filter("epsilon_cutoff", lambda x, _: epsilon_cutoff(x, settings.epsilon_cutoff, keep)))
    if settings.eta_cutoff > 0.0:
        found.append(Filter("eta_cutoff", lambda x, _: eta_cutoff(x, settings.eta_cutoff, keep)))
    return found


def temperature(logits_BV: Tensor, t: float) -> Tensor:
    """Logits over `t`: below 1 the likely become likelier, above 1 the unlikely do (Ackley et al. 1985, §2)."""
    if t >= _COLD:
        return logits_BV / t
    # The likeliest are 0 then, and what is too far below them for a number is as good as ruled out.
    below_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    return below_BV / max(t, torch.finfo(logits_BV.dtype).tiny)


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest tokens, and those as likely as the last of them (Fan et al. 2018, §5.4)."""
    last_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < last_B1, -torch.inf)


def top_p(logits_BV: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the fewest tokens whose probabilities add up to `p`, the nucleus (Holtzman et al. 2020, §3.1).

    `keep` tokens are kept whatever they add up to.
    """
    sorted_BV, order_BV = logits_BV.sort(descending=True)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV  # how much the likelier ones have
    dropped_BV = before_BV >= p
    dropped_BV[:, :keep] = False
    return logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)


def min_p(logits_BV: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the tokens at least `p` times as likely as the likeliest (Nguyen et al. 2025, §3)."""
    probabilities_BV = logits_BV.softmax(dim=-1)
    dropped_BV = probabilities_BV < p * probabilities_BV.amax(dim=-1, keepdim=True)
    first_BK = probabilities_BV.topk(min(keep, logits_BV.shape[-1])).indices
    return logits_BV.masked_fill(dropped_BV.scatter(1, first_BK, False), -torch.inf)


def typical_p(logits_BV: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the tokens whose surprise is nearest the average one, until they add up to `p` (Meister et al. 2023, §4).

    A token's surprise is -log of its probability, and the average of it the distribution's entropy: a very likely
    token may fall, for it says less than the text says on average.
    """
    log_p_BV = logits_BV.log_softmax(dim=-1)
    entropy_B1 = -(log_p_BV * log_p_BV.exp()).nansum(dim=-1, keepdim=True)
    away_BV, order_BV = (-log_p_BV - entropy_B1).abs().sort()
    sums_BV = logits_BV.gather(1, order_BV).softmax(dim=-1).cumsum(dim=-1)
    last_B1 = (sums_BV < p).sum(dim=-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
    dropped_BV = away_BV > away_BV.gather(1, last_B1)
    dropped_BV[:, :keep] = False
    return logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)


def epsilon_cutoff(logits_BV: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Keep the tokens at least `epsilon` likely (Hewitt et al. 2022, §4.1); `keep` tokens are kept in any case."""
    return _at_least(logits_BV, logits_BV.new_full((len(logits_BV), 1), epsilon), keep)


def eta_cutoff(logits_BV: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """The same with a bound that falls where the model is unsure: the smaller of `epsilon` and √epsilon · e^-entropy.

    Among many tokens with little chance each, a bound that is right where the model is sure would leave few of them
    (Hewitt et al. 2022, §4.2).
    """
    log_p_BV = logits_BV.log_softmax(dim=-1)
    entropy_B1 = -(log_p_BV * log_p_BV.exp()).nansum(dim=-1, keepdim=True)
    return _at_least(logits_BV, (epsilon**0.5 * (-entropy_B1).exp()).clamp(max=epsilon), keep)


def _at_least(logits_BV: Tensor, least_B1: Tensor, keep: int) -> Tensor:
    """Without the tokens less likely than a bound, of which the `keep` likeliest stay."""
    kept_B1 = logits_BV.topk(min(keep, logits_BV.shape[-1])).values[:, -1:]
    dropped_BV = (logits_BV.softmax(dim=-1) < least_B1) & (logits_BV < kept_B1)
    return logits_BV.masked_fill(dropped_BV, -torch.inf)


def ban(logits_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Rule out some tokens."""
    return logits_BV.index_fill(1, torch.tensor(ids, device=logits_BV.device), -torch.inf)


def force(logits_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Rule out all tokens but some."""
    forced_BV = torch.full_like(logits_BV, -torch.inf)
    forced_BV[:, list(ids)] = 0.0
    return forced_BV
