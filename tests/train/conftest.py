"""Tiny models of each shape, and batches that they can learn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lathe.architecture import Architecture
from lathe.data import Batches, Corpus
from lathe.objectives import Causal, Masked, Objective, SpanCorruption, SpecialTokens
from lathe.presets import preset

VOCAB = 64
SPECIAL = SpecialTokens(
    vocab_size=VOCAB, pad=0, eos=1, cls=2, sep=3, mask=4, sentinels=tuple(range(63, 53, -1)), decoder_start=0
)
SMALL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 32, "vocab_size": VOCAB}
TOKENS = {"tokens.pad": 0, "tokens.eos": [1], "tokens.bos": None}
SHAPES: dict[str, tuple[Architecture, Objective]] = {
    "t5": (preset("t5-small").with_(**SMALL), SpanCorruption(special=SPECIAL)),
    "bert": (preset("bert-base-uncased", head="masked").with_(**SMALL, max_positions=32), Masked(special=SPECIAL)),
    "gpt2": (preset("gpt2").with_(TOKENS, **SMALL, max_positions=32), Causal(special=SPECIAL)),
}


@pytest.fixture
def shape() -> Callable[[str], tuple[Architecture, Objective]]:
    """The architecture and the objective that go by a name."""
    return SHAPES.__getitem__


@pytest.fixture
def batches() -> Callable[..., Batches]:
    """Batches of counting-up documents, which a model learns in a few steps."""

    def make(name: str, rows: int = 4, seed: int = 0) -> Batches:
        rng = np.random.default_rng(0)
        starts, sizes = rng.integers(7, 30, size=60), rng.integers(6, 20, size=60)
        corpus = Corpus.of(VOCAB, text=[np.arange(start, start + size) for start, size in zip(starts, sizes)])
        return Batches(corpus, SHAPES[name][1], length=32, rows=rows, seed=seed)

    return make
