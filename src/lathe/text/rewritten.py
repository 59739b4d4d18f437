"""A tokenizer that was made from another, and how its ids go back to the other's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lathe.errors import LatheError
from lathe.text.tokenizer import Tokenizer

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rewritten:
    """A tokenizer with other pieces than the one that it was made from.

    Attributes:
        rows: for each of its ids, the old ids that it stands for: one for a piece that was there before, and for a
            new piece those that spelt it.
        origin: the first `origin` of its ids are old pieces, in their old order.
    """

    tokenizer: Tokenizer
    rows: Rows
    origin: int

    def then(self, later: Rewritten) -> Rewritten:
        """Both changes as one, where `later` was made from this one's tokenizer."""
        rows = tuple(tuple(old for middle in row for old in self.rows[middle]) for row in later.rows)
        return Rewritten(later.tokenizer, rows, sum(self.is_old(row) for row in later.rows[: later.origin]))

    def is_old(self, row: tuple[int, ...]) -> bool:
        """Whether a row of a later change is one of the old pieces here."""
        return len(row) == 1 and row[0] < self.origin


def remade(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> Tokenizer:
    """A tokenizer of rewritten files, which follow the same conventions as those of `tokenizer`."""
    settings = tokenizer.settings
    return Tokenizer.from_files(files, convention=settings.tokenizer_class if settings.rules else None)


def unchanged(tokenizer: Tokenizer) -> Rewritten:
    """The tokenizer as it is."""
    return Rewritten(tokenizer, tuple((number,) for number in range(tokenizer.vocab_size)), tokenizer.vocab_size)


def require_tokens(tokenizer: Tokenizer, expected: Sequence[str]) -> None:
    """See that the ids of a rewritten tokenizer are those that were meant.

    Raises:
        LatheError: they are not; names the first that differs.
    """
    # Not `id_to_token`, which has an added token as the normaliser leaves it.
    found = {number: token for token, number in tokenizer.vocabulary.items()}
    for number, token in enumerate(expected):
        if found.get(number) != token:
            raise LatheError(
                f"this tokenizer's files cannot be rewritten: the token {token!r} should have the id {number}, which "
                f"is {found.get(number)!r}; give the model a tokenizer.json that spells everything out"
            )
    if tokenizer.vocab_size != len(expected):
        raise LatheError(
            f"this tokenizer's files cannot be rewritten: they hold {tokenizer.vocab_size} tokens where "
            f"{len(expected)} were meant; give the model a tokenizer.json that spells everything out"
        )


def engine_document(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json that the engine runs, whatever files it was read from."""
    document: dict[str, Any] = json.loads(tokenizer.engine.to_str())
    return document


def model_ids(model: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary of a model's part of a tokenizer.json: token to id."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {entry[0]: number for number, entry in reversed(list(enumerate(vocab)))}
    return dict(vocab)


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, first to be applied first; none of any other."""
    pairs = []
    for merge in model.get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs
