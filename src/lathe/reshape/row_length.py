"""How long the rows are on which a model is cut, measured and healed: as long as it reads them well.

A long document is cut into rows, and a model may have room for longer ones than it was ever shown: a BERT with 128
positions that learnt from reviews of 15 words, a T5 whose biases reach any distance. What it computes at places that
it was not trained at is noise, and a cut that is fitted on noise spends itself on that. How it was trained is in no
checkpoint. Its loss tells: too short a row hides what a word depends on, too long a one confuses, and in between is
the length that the model knows. So the source reads some long documents in rows of several lengths, and the longest is
taken whose loss is the lowest, but for chance.

Documents that fit into the shortest of these rows are shown whole in any of them, so that nothing is to be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lathe.model.transformer import Transformer
from lathe.reshape.measure import quality
from lathe.reshape.text import Documents, TextSettings, lay, natural_objective, row_length
from lathe.text.tokenizer import Tokenizer

_SHORTEST = 32
_TOKENS = 8192  # that are read at each length
_BY_CHANCE = 0.03  # a share of the loss: lengths hide other words, so losses differ a little in any case


@dataclass(frozen=True)
class RowLength:
    """A length, and what it was chosen by.

    Args:
        losses: nats a target at each length that was tried; none where nothing was to be chosen.
    """

    positions: int
    losses: Mapping[int, float]

    @property
    def told(self) -> str:
        """Why it is that, as words of a report; empty where nothing was chosen."""
        longest = max(self.losses, default=self.positions)
        if longest == self.positions:
            return ""
        return (
            f"of {self.positions} tokens, where the model's loss is {self.losses[self.positions]:.2f}; "
            f"of {longest}, the longest, it is {self.losses[longest]:.2f}"
        )


def best_length(
    model: Transformer,
    documents: Documents,
    settings: TextSettings,
    tokenizer: Tokenizer,
    asked: Mapping[str, Any] | None = None,
) -> RowLength:
    """The length of rows that the model reads best: 256 or as many positions as it has, or a half, a quarter …

    Args:
        settings: how the documents are shown; its own length, where it has one, is the answer.
        asked: the objective's name and settings; what the model's head says where left out.

    Raises:
        RequestError: an objective that does not fit the model.
    """
    most = row_length(settings, model.architecture)
    if settings.length is not None or documents.targets is not None:  # pairs are not cut into rows
        return RowLength(most, {})
    if natural_objective(model.architecture, tokenizer, asked) is None:
        return RowLength(most, {})
    lengths = [most]
    while lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    long = _long_ones(documents, tokenizer, lengths[-1])
    if not long:
        return RowLength(most, {})
    longest = max(map(len, tokenizer.encode_batch(list(long.texts), add_special_tokens=False)))
    # Rows longer than every document are all the same.
    tried = [most, *(length for length in lengths[1:] if length < longest)]
    losses: dict[int, float] = {}
    for length in tried:
        text = lay(long, replace(settings, length=length), model.architecture, tokenizer, asked)
        found = quality(model, text)
        assert found is not None
        losses[length] = found.loss
    enough = (1 + _BY_CHANCE) * min(losses.values())
    return RowLength(max(length for length in tried if losses[length] <= enough), losses)


def _long_ones(documents: Documents, tokenizer: Tokenizer, shortest: int) -> Documents:
    """Documents that rows of different lengths show differently, as many as are read."""
    kept: list[str] = []
    tokens = 0
    for text, ids in zip(
        documents.texts, tokenizer.encode_batch(list(documents.texts), add_special_tokens=False), strict=True
    ):
        if len(ids) > shortest and tokens < _TOKENS:
            kept.append(text)
            tokens += len(ids)
    return Documents.of(kept)
