"""What every objective is: a pure function from (a piece of a document, a generator) to inputs and labels.

An objective owns no data, no order and no batch. It says how long a piece of a document may be so that it
fits a row, how many positions that piece takes, and what the model is shown and asked. Because `sample`
draws from a generator that the caller derives from the sample's number, the same sample is the same on
every rank, in every run and after every resume.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.model.loss import IGNORED
from lathe.spec import Spec, size

IntArray: TypeAlias = NDArray[np.int64]
Record: TypeAlias = Mapping[str, IntArray]  # a document's token ids, field by field: {"text": …}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens(Spec):
    """The token ids that objectives insert or must not touch; None where the tokenizer has no such token."""

    vocab_size: int = size(2**24)
    pad: int | None = size(2**24, least=0, default=None)
    bos: int | None = size(2**24, least=0, default=None)
    eos: int | None = size(2**24, least=0, default=None)
    cls: int | None = size(2**24, least=0, default=None)
    sep: int | None = size(2**24, least=0, default=None)
    mask: int | None = size(2**24, least=0, default=None)
    sentinels: tuple[int, ...] = ()  # T5's <extra_id_0>, <extra_id_1>, …
    decoder_start: int | None = size(2**24, least=0, default=None)
    reserved: tuple[int, ...] = ()  # more ids that stand for no text (the unknown, language codes)

    def need(self, name: str, what: str) -> int:
        """The id of the special token `name`; `RequestError` where the tokenizer has none."""
        token = getattr(self, name)
        if token is None:
            raise RequestError(f"{what} needs a {name} token and the tokenizer has none; use one that has it")
        assert isinstance(token, int)
        return token

    def ordinary(self) -> IntArray:
        """Every id that is no special token."""
        named = (self.pad, self.bos, self.eos, self.cls, self.sep, self.mask, self.decoder_start)
        special = {token for token in (*named, *self.sentinels, *self.reserved) if token is not None}
        return np.setdiff1d(np.arange(self.vocab_size, dtype=np.int64), np.array(sorted(special), dtype=np.int64))


@dataclass(frozen=True)
class Sample:
    """One example, before it is laid into a row.

    `labels` are the decoder's where the model has both stacks; else they stand beside `input_ids`, and
    −100 marks the positions that are not asked. `numbers` holds what a whole row has one of, by the model's
    keyword name (`next_sentence_label`).
    """

    input_ids: IntArray
    labels: IntArray
    token_type_ids: IntArray | None = None
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Objective(Spec):
    """What is predicted. A subclass is a small file: its settings as fields, and the methods below."""

    special: SpecialTokens

    stacks: ClassVar[tuple[str, ...]]  # which stacks the model must have
    reads: ClassVar[tuple[str, ...]] = ("text",)  # the fields of a record
    packs: ClassVar[bool] = True  # whether several samples may share a row
    least: ClassVar[int] = 2  # a shorter piece has nothing to ask
    name: ClassVar[str]

    @abstractmethod
    def window(self, length: int) -> int:
        """The longest piece of text whose sample fits a row of `length` positions."""

    @abstractmethod
    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """The most positions that pieces of these lengths take in a row, and in the decoder's row.

        The second is all 0 for a model of one stack.
        """

    @abstractmethod
    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """The example made of one piece; all chance comes from `rng`."""

    def fit(self, architecture: Architecture) -> None:
        """Raise `RequestError` where a model of this architecture cannot learn this objective."""
        have = tuple(name for name, _ in architecture.stacks)
        if have != self.stacks:
            raise RequestError(
                f"the objective {self.name} trains a model with {' and '.join(self.stacks)}; "
                f"this one has {' and '.join(have)}; choose another objective or another model"
            )
        if architecture.head.language is None:
            raise RequestError(f"the objective {self.name} predicts tokens; this model has no language head; add one")
        if self.special.vocab_size > architecture.embedding.vocab_size:
            raise RequestError(
                f"the tokenizer has {self.special.vocab_size:,} tokens and the model's vocabulary is "
                f"{architecture.embedding.vocab_size:,}; use the model's own tokenizer, or a larger vocab_size"
            )


def rounded(share: float, count: int | np.integer[Any]) -> int:
    """`share · count` to the nearest whole number, at least 1 and below `count` (halves go to the even one)."""
    return int(min(max(round(share * int(count)), 1), int(count) - 1))


__all__ = ["IGNORED", "IntArray", "Objective", "Record", "Sample", "SpecialTokens", "rounded"]
