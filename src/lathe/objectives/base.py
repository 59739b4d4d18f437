"""What every objective is: a pure function from (a piece of a document, a generator) to inputs and labels.

An objective owns no data, no order and no batch. It says how many positions a sample takes, and what the
model is shown and asked; one over running text also says how long a piece may be to fit a row. Because `sample`
draws from a generator that the caller derives from the sample's number, the same sample is the same on
every rank, in every run and after every resume.
"""

from __future__ import annotations

import functools
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
Record: TypeAlias = Mapping[str, IntArray]  # what a sample is made of, field by field: {"text": …}
LAST = "last"  # beside the text of a piece: one number, 0 where its document goes on after it


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
    continues: tuple[int, ...] = ()  # ids that go on with the word of the token before (##ing)
    # What the tokenizer sets before a text, between the two texts of a pair, and after the last; None: unknown.
    front: tuple[int, ...] | None = ()
    middle: tuple[int, ...] | None = ()
    back: tuple[int, ...] | None = ()
    token_types: bool = False  # whether the second text of a pair has token type 1

    def need(self, name: str, what: str) -> int:
        """The id of the special token `name`; `RequestError` where the tokenizer has none."""
        token = getattr(self, name)
        if token is None:
            raise RequestError(f"{what} needs a {name} token and the tokenizer has none; use one that has it")
        assert isinstance(token, int)
        return token

    @functools.cached_property
    def ids(self) -> frozenset[int]:
        """Every id that is a special token."""
        named = (self.pad, self.bos, self.eos, self.cls, self.sep, self.mask, self.decoder_start)
        return frozenset(token for token in (*named, *self.sentinels, *self.reserved) if token is not None)

    @functools.cached_property
    def ordinary(self) -> IntArray:
        """Every id that is no special token."""
        return np.setdiff1d(np.arange(self.vocab_size, dtype=np.int64), np.array(sorted(self.ids), dtype=np.int64))

    @functools.cached_property
    def continuing(self) -> NDArray[np.bool_]:
        """For every id, whether it goes on with the word of the token before."""
        table = np.zeros(self.vocab_size, dtype=bool)
        table[np.array(self.continues, dtype=np.int64)] = True
        return table

    def framed(self, text: IntArray, *, ends: bool = True) -> IntArray:
        """`text` between the tokenizer's own beginning and end marks, of those that it has (BOS, EOS).

        Args:
            ends: whether the text ends there; else there is no end mark.
        """
        front = [] if self.bos is None else [self.bos]
        back = [] if self.eos is None or not ends else [self.eos]
        return np.concatenate((np.array(front, np.int64), text, np.array(back, np.int64)))

    @property
    def n_marks(self) -> int:
        """How many marks `framed` adds."""
        return (self.bos is not None) + (self.eos is not None)


@dataclass(frozen=True)
class Sample:
    """One example, before it is laid into a row.

    `labels` are the decoder's where the model has both stacks; else they stand beside `input_ids`, and
    −100 marks the positions that are not asked. `numbers` holds what a whole row has one of, by the model's
    keyword name (`next_sentence_label`); a classifier's class is its `labels`, and the field is then empty.
    """

    input_ids: IntArray
    labels: IntArray
    token_type_ids: IntArray | None = None
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Objective(Spec):
    """What is predicted. A subclass is a small file: its settings as fields, and how a sample is made."""

    special: SpecialTokens

    stacks: ClassVar[tuple[str, ...]]  # which stacks the model must have
    packs: ClassVar[bool] = True  # whether several samples may share a row
    name: ClassVar[str]

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields of a record that `sample` needs."""
        return ("text",)

    @abstractmethod
    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """The example made of one record; all chance comes from `rng`."""

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
        self.fit_vocabulary(architecture)

    def fit_vocabulary(self, architecture: Architecture) -> None:
        """Raise `RequestError` where the tokenizer has more tokens than the model's vocabulary."""
        if self.special.vocab_size > architecture.embedding.vocab_size:
            raise RequestError(
                f"the tokenizer has {self.special.vocab_size:,} tokens and the model's vocabulary is "
                f"{architecture.embedding.vocab_size:,}; use the model's own tokenizer, or a larger vocab_size"
            )


@dataclass(frozen=True, kw_only=True)
class TextObjective(Objective):
    """An objective over running text: a long document is cut into pieces, and each is a sample.

    A record is `text`, the piece; `last`, whether its document ends with it; `breaks`, the places inside it at
    which a sentence ends, if `reads` names it; and, where `another` is set, `other` and `other_breaks`: the same
    of a piece of another document, which the caller draws from the sample's number.
    """

    least: ClassVar[int] = 2  # a shorter piece has nothing to ask
    another: ClassVar[bool] = False

    @abstractmethod
    def window(self, length: int) -> int:
        """The longest piece of text whose sample fits a row of `length` positions."""

    @abstractmethod
    def widths(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """The most positions that pieces of these lengths take in a row, and in the decoder's row.

        The second is all 0 for a model of one stack.
        """


@dataclass(frozen=True, kw_only=True)
class RecordObjective(Objective):
    """An objective over whole records (a pair, a labelled text), which are never cut in pieces."""

    @abstractmethod
    def record_widths(self, lengths: Mapping[str, IntArray]) -> tuple[IntArray, IntArray]:
        """The positions that records take in a row and in the decoder's, from the lengths of their fields."""

    def check_labels(self, labels: IntArray) -> None:
        """Raise `RequestError` where a record's class cannot be; called where `reads` names `label`."""
        raise RequestError(f"the objective {self.name} reads no label")


def rounded(share: float, count: int | np.integer[Any]) -> int:
    """`share · count` to the nearest whole number, at least 1 and below `count` (halves go to the even one)."""
    return int(min(max(round(share * int(count)), 1), int(count) - 1))


__all__ = [
    "IGNORED",
    "LAST",
    "IntArray",
    "Objective",
    "Record",
    "RecordObjective",
    "Sample",
    "SpecialTokens",
    "TextObjective",
    "rounded",
]
