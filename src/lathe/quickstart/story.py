"""What the quickstart does for each kind of model: which sizes, which objective, which cut.

The steps are counts, not seconds, so the same seed gives the same numbers on any machine of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.presets import preset
from lathe.spec import unknown


@dataclass(frozen=True)
class Story:
    """One quickstart.

    Args:
        preset: the published model whose kind this is; `sizes` makes it small.
        convention: whose tokenizer is trained.
        objective: what is predicted, by the objective's name.
        cut: the sizes that the trained model is cut to.
        steps, heal_steps: how long it trains and heals.
        optimizer, lr: what trains it, and its peak rate.
        heal_lr: the healing's, by Adafactor.
        rows: rows of `length` positions in a batch.
    """

    preset: str
    convention: str
    objective: str
    cut: Mapping[str, Any]
    sizes: Mapping[str, Any]
    head: str | None = None
    vocab_size: int = 2000
    length: int = 128
    rows: int = 24
    optimizer: str = "adamw"
    lr: float = 5e-3
    heal_lr: float = 5e-3
    steps: int = 550
    heal_steps: int = 80
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    def architecture(self, vocab_size: int, tokens: Mapping[str, Any]) -> Architecture:
        """The small model, for a vocabulary of this size and these special tokens."""
        base = preset(self.preset, head=self.head)
        return base.with_({**self.sizes, "vocab_size": vocab_size, "tokens": {**base.tokens.to_dict(), **tokens}})


_DECODER_SIZES = {"d_model": 96, "n_layers": 3, "n_heads": 4, "d_head": 24, "d_ff": 256}

STORIES: dict[str, Story] = {
    "t5": Story(
        preset="t5-small",
        convention="t5",
        objective="span_corruption",
        sizes={"d_model": 96, "n_layers": 2, "n_heads": 4, "d_head": 24, "d_ff": 256},
        cut={"d_model": 72},
        # Its table begins at a size of 1 and its matrices at a tenth of it: each learns by a share of its own size.
        optimizer="adafactor",
        lr=3e-2,
    ),
    "gpt2": Story(
        preset="gpt2",
        convention="gpt2",
        objective="causal",
        sizes={**_DECODER_SIZES, "max_positions": 256},
        cut={"d_model": 72},
    ),
    "llama": Story(
        preset="llama-2-7b",
        convention="llama",
        objective="causal",
        sizes={**_DECODER_SIZES, "max_positions": 256, "n_kv_heads": 2},
        cut={"d_model": 72},
    ),
    "albert": Story(
        preset="albert-base",
        convention="albert",
        objective="masked",
        head="masked",
        sizes={
            "d_model": 96,
            "d_embed": 96,
            "n_layers": 4,
            "n_heads": 4,
            "d_head": 24,
            "d_ff": 384,
            "max_positions": 256,
        },
        cut={"d_embed": 48},
    ),
}


def story(name: str) -> Story:
    """The story of that name; an unknown one is a `RequestError` that names those there are."""
    if name not in STORIES:
        raise RequestError(unknown("family for the quickstart", name, STORIES))
    return STORIES[name]
