"""A tokenizer with every special token, trained on a few words."""

from __future__ import annotations

import pytest

from lathe.text.tokenizer import Tokenizer
from lathe.text.train import train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "running trains, training runs; jumping and jumped!"] * 20


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    return train_tokenizer(TEXTS, 75, convention="bert")
