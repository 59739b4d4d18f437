"""What a model learns to predict: each objective turns a document's token ids into inputs and labels."""

from lathe.objectives.base import IGNORED, IntArray, Objective, Record, Sample, SpecialTokens
from lathe.objectives.causal import Causal
from lathe.objectives.masked import Masked
from lathe.objectives.span_corruption import SpanCorruption

__all__ = [
    "IGNORED",
    "Causal",
    "IntArray",
    "Masked",
    "Objective",
    "Record",
    "Sample",
    "SpanCorruption",
    "SpecialTokens",
]
