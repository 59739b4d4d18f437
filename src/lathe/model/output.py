"""What a forward pass returns, under `transformers`' field names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from lathe.model.cache import Cache


@dataclass
class Output:
    """The results of one forward pass; fields that were not asked for, or do not apply, are None.

    Shapes: B batch, T positions, S encoder positions, D d_model, V vocabulary, H heads.

    Fields read as attributes or by name: `output.logits`, `output["logits"]`.
    """

    loss: Tensor | None = None  # a single number
    logits: Tensor | None = None  # B × T × V, or label logits where the model has no language head
    seq_relationship_logits: Tensor | None = None  # B × labels, beside a language head (BERT, ALBERT pretraining)
    last_hidden_state: Tensor | None = None  # B × T × D, of the decoder where there is one
    pooler_output: Tensor | None = None  # B × D
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings and each layer, B × T × D
    attentions: tuple[Tensor, ...] | None = None  # B × H × T × T a layer
    encoder_last_hidden_state: Tensor | None = None  # B × S × D
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None  # B × H × T × S a layer
    past_key_values: Cache | None = None

    @property
    def prediction_logits(self) -> Tensor | None:
        """`logits` under the name that BERT's and ALBERT's pretraining models give them."""
        return self.logits

    @property
    def sop_logits(self) -> Tensor | None:
        """`seq_relationship_logits` under ALBERT's name."""
        return self.seq_relationship_logits

    def keys(self) -> list[str]:
        """The fields that hold something."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
