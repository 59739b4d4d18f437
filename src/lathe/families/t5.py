"""T5 (Raffel et al. 2020) and mT5 (Xue et al. 2021): encoder-decoder, pre-norm RMSNorm, relative bias.

Scores are not scaled by √d_head; the initialisation makes up for it. Tied models multiply the decoder's
output by d_model^-1/2 before the head (Mesh TensorFlow's convention); version 1.1, FLAN and mT5 are untied,
unscaled and gated. `d_kv` is free of `d_model`.

Files: `shared.weight` is the table of both stacks. `transformers` 4 knows `tie_word_embeddings` alone and
derives the scaling from it; version 5 has `scale_decoder_outputs` for the scaling. Both are written, and only
pairs that both versions read alike are allowed: tied and scaled, or untied and unscaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lathe.architecture import (
    Architecture,
    Attention,
    Classifier,
    Dropout,
    Embedding,
    FeedForward,
    Head,
    Initialisation,
    LanguageHead,
    Norm,
    Pooler,
    Positions,
    Stack,
    Tokens,
)
from lathe.families.base import (
    Config,
    Entry,
    Family,
    Objection,
    activation_from,
    activation_to,
    first_of,
    ids_of,
    required,
)
