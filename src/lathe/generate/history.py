"""What stands in a row so far, and the filters that judge a token by it.

A row's text is its prompt and what was added; pads are no part of it, so a row is judged alike alone and in any
batch. (`transformers` counts a short row's pads as text for n-grams, and those of a source for its penalty.)

- A penalty makes tokens that are there already less likely: by a factor on the logit (`repetition`, Keskar et al.
  2019, §4.1), or by an amount once (`presence`) or for each time (`frequency`), as OpenAI's API defines the two.
- A ban rules out the token that would complete a run of tokens: one that is there already (`ngrams`, Paulus et al.
  2018, §2.5), or one from a list (`bad words`).

Shape suffixes: B rows, T positions, V vocabulary, N the run's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lathe.generate.prompt import Prompt


@dataclass
class History:
    """The rows' texts.

    Args:
        ids_BT: the tokens so far, rows aligned at the right.
        pads_B: how many columns of each row are pads, all on the left.
        columns: of the prompt as the caller gave it, pads counted.
        max_new: how many tokens may be added.
        source: what the encoder reads, else the prompt itself; row i belongs to row i // (B / its rows).
        n_new: tokens added since the prompt.
    """

    ids_BT: Tensor
    pads_B: Tensor
    columns: int
    max_new: int
    source: Prompt
    n_new: int = field(default=0)

    @classmethod
    def of(cls, prompt: Prompt, columns: int, max_new: int, source: Prompt | None, copies: int = 1) -> History:
        """The history of a prompt that is padded on the left, each row `copies` times side by side."""
        pads_B = prompt.mask_BT.shape[1] - prompt.mask_BT.sum(1)
        ids_BT = prompt.ids_BT.repeat_interleave(copies, dim=0)
        return cls(ids_BT, pads_B.repeat_interleave(copies), columns, max_new, source or prompt)

    def append(self, tokens_B: Tensor) -> None:
        """Add a token to each row."""
        self.ids_BT = torch.cat((self.ids_BT, tokens_B[:, None]), dim=1)
        self.n_new += 1

    def reorder(self, rows_B: Tensor) -> None:
        """Make row i a copy of the old row `rows_B[i]`, which has the same prompt."""
        self.ids_BT = self.ids_BT[rows_B]

    @property
    def mask_BT(self) -> Tensor:
        """True for a token, False for a pad."""
        return torch.arange(self.ids_BT.shape[1], device=self.pads_B.device) >= self.pads_B[:, None]

    @property
    def new_BT(self) -> Tensor:
        """The tokens added since the prompt."""
        return self.ids_BT[:, self.ids_BT.shape[1] - self.n_new :]

    def of_source(self, tensor: Tensor) -> Tensor:
        """A tensor with a row for each row of the source, with one for each row of the batch."""
        return tensor.repeat_interleave(len(self.ids_BT) // len(tensor), dim=0)


def penalise(logits_BV: Tensor, ids_BT: Tensor, mask_BT: Tensor, penalty: float) -> Tensor:
    """Tokens among `ids_BT` with their logit over `penalty` where it is positive, times it where negative."""
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(_count(logits_BV, ids_BT, mask_BT) > 0, penalised_BV, logits_BV)


def repetition(logits_BV: Tensor, at: History, penalty: float) -> Tensor:
    """Every token of the text, the prompt's too, less likely by a factor (Keskar et al. 2019, §4.1)."""
    return penalise(logits_BV, at.ids_BT, at.mask_BT, penalty)


def encoder_repetition(logits_BV: Tensor, at: History, penalty: float) -> Tensor:
    """Every token of the source more likely by a factor, against text that strays from it."""
    ids_BT, mask_BT = at.of_source(at.source.ids_BT), at.of_source(at.source.mask_BT)
    return penalise(logits_BV, ids_BT, mask_BT, 1 / penalty)


def presence(logits_BV: Tensor, at: History, penalty: float) -> Tensor:
    """Every token that was added already less likely by an amount, however often it came."""
    counts_BV = _count(logits_BV, at.new_BT, torch.ones_like(at.new_BT))
    return logits_BV - penalty * (counts_BV > 0)


def frequency(logits_BV: Tensor, at: History, penalty: float) -> Tensor:
    """Every token that was added already less likely by an amount for each time."""
    return logits_BV - penalty * _count(logits_BV, at.new_BT, torch.ones_like(at.new_BT))


def repeated_ngrams(logits_BV: Tensor, at: History, n: int) -> Tensor:
    """Without the tokens that would repeat a run of `n` tokens of the text."""
    return _without_ngrams(logits_BV, at, at.ids_BT, at.mask_BT, n)


def source_ngrams(logits_BV: Tensor, at: History, n: int) -> Tensor:
    """Without the tokens that would repeat a run of `n` tokens of the source."""
    return _without_ngrams(logits_BV, at, at.of_source(at.source.ids_BT), at.of_source(at.source.mask_BT), n)


def bad_words(logits_BV: Tensor, at: History, words: Sequence[Sequence[int]]) -> Tensor:
    """Without the tokens that would complete one of the runs."""
    banned_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    length = at.ids_BT.shape[1]
    for *before, last in words:
        if len(before) > length:
            continue
        tail_BN = at.ids_BT[:, length - len(before) :]
        prefix_N = torch.tensor(before, dtype=torch.long, device=tail_BN.device)
        banned_BV[:, last] |= (tail_BN == prefix_N).all(dim=1) & (at.pads_B + len(before) <= length)
    return logits_BV.masked_fill(banned_BV, -torch.inf)


def _count(logits_BV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """How often each token stands among the ids, B × V."""
    return torch.zeros_like(logits_BV).scatter_add_(1, ids_BT, mask_BT.to(logits_BV.dtype))


def _without_ngrams(logits_BV: Tensor, at: History, ids_BT: Tensor, mask_BT: Tensor, n: int) -> Tensor:
    """Where the text ends on the first n - 1 of a run of n tokens in `ids_BT`, without the run's last."""
    length = at.ids_BT.shape[1]
    if ids_BT.shape[1] < n or length < n - 1:
        return logits_BV
    runs_BTN = ids_BT.unfold(1, n, 1)
    tail_BN = at.ids_BT[:, length - n + 1 :]
    match_BT = (runs_BTN[..., :-1] == tail_BN[:, None]).all(dim=-1) & mask_BT.bool().unfold(1, n, 1).all(dim=-1)
    match_BT &= (at.pads_B + n - 1 <= length)[:, None]
    return logits_BV.masked_fill(_count(logits_BV, runs_BTN[..., -1], match_BT) > 0, -torch.inf)
