"""Text to token ids and back: the families' own tokenizers, training new ones, padding and masks."""

from __future__ import annotations

from lathe.text.batch import Batch, pad
from lathe.text.tokenizer import Tokenizer
from lathe.text.train import train_tokenizer

__all__ = ["Batch", "Tokenizer", "pad", "train_tokenizer"]
