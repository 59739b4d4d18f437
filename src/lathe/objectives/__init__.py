"""What a model learns to predict: each objective turns token ids into inputs and labels."""

from lathe.objectives.base import (
    IGNORED,
    IntArray,
    Objective,
    Record,
    RecordObjective,
    Sample,
    SpecialTokens,
    TextObjective,
)
from lathe.objectives.by_name import OBJECTIVES, objective
from lathe.objectives.causal import Causal
from lathe.objectives.classification import Classification
from lathe.objectives.denoising import Denoising
from lathe.objectives.masked import Masked
from lathe.objectives.next_sentence import NextSentence
from lathe.objectives.sentence_order import SentenceOrder
from lathe.objectives.seq2seq import Seq2Seq
from lathe.objectives.span_corruption import SpanCorruption

__all__ = [
    "IGNORED",
    "OBJECTIVES",
    "Causal",
    "Classification",
    "Denoising",
    "IntArray",
    "Masked",
    "NextSentence",
    "Objective",
    "Record",
    "RecordObjective",
    "Sample",
    "SentenceOrder",
    "Seq2Seq",
    "SpanCorruption",
    "SpecialTokens",
    "TextObjective",
    "objective",
]
