"""Objectives by name, for settings files and the command line."""

from __future__ import annotations

from typing import Any

from lathe.errors import RequestError
from lathe.objectives.base import Objective, SpecialTokens
from lathe.objectives.causal import Causal
from lathe.objectives.classification import Classification
from lathe.objectives.denoising import Denoising
from lathe.objectives.masked import Masked
from lathe.objectives.next_sentence import NextSentence
from lathe.objectives.sentence_order import SentenceOrder
from lathe.objectives.seq2seq import Seq2Seq
from lathe.objectives.span_corruption import SpanCorruption
from lathe.spec import unknown

_ALL: tuple[type[Objective], ...] = (
    Causal,
    Masked,
    NextSentence,
    SentenceOrder,
    SpanCorruption,
    Denoising,
    Seq2Seq,
    Classification,
)
OBJECTIVES: dict[str, type[Objective]] = {each.name: each for each in _ALL}


def objective(name: str, special: SpecialTokens, **settings: Any) -> Objective:
    """The objective of that name: `objective("masked", special, whole_words=True)`.

    Raises:
        RequestError: an unknown name or setting, a value that cannot be, a tokenizer without a token it needs.
    """
    if name not in OBJECTIVES:
        raise RequestError(unknown("objective", name, OBJECTIVES))
    return OBJECTIVES[name].from_dict({"special": special, **settings})
