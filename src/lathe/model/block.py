"""One layer: attention, cross-attention where there is an encoder, feed-forward; each with its norm and skip.

Pre-norm adds `f(norm(x))` to the stream and keeps the stream itself untouched, so it can be rotated as a
whole. Post-norm (the original transformer, BERT, BART) norms the sum, so every layer rescales the stream.

A layer owns no weights: it is a pair of references into its stack's lists, so layers that share weights
(ALBERT §3.1) are layers with the same references.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lathe.model.attention import AttentionLayer
from lathe.model.cache import LayerCache
from lathe.model.feed_forward import FeedForwardLayer
from lathe.model.mask import Mask
from lathe.model.positions import Rotation


@dataclass(frozen=True)
class Surroundings:
    """What every layer of one forward pass is given."""

    mask: Mask
    bias_BHTS: Tensor | None = None
    rotation: Rotation | None = None
    memory_BSD: Tensor | None = None
    memory_mask: Mask | None = None
    weights: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer's modules; not a module itself, because layers may share them."""

    attention: AttentionLayer
    cross_attention: AttentionLayer | None
    feed_forward: FeedForwardLayer
    pre_norm: bool
    dropout: nn.Dropout

    def __call__(
        self,
        x_BTD: Tensor,
        around: Surroundings,
        cache: LayerCache | None = None,
        memory_cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream after the layer, and the attention and cross-attention weights when asked for."""
        added, seen = self.attention(
            self._into(self.attention, x_BTD),
            around.mask,
            bias_BHTS=around.bias_BHTS,
            rotation=around.rotation,
            cache=cache,
            weights=around.weights,
        )
        x_BTD = self._onto(self.attention, x_BTD, added)
        crossed: Tensor | None = None
        if self.cross_attention is not None:
            added, crossed = self.cross_attention(
                self._into(self.cross_attention, x_BTD),
                around.memory_mask or Mask(),
                memory_BSD=around.memory_BSD,
                cache=memory_cache,
                weights=around.weights,
            )
            x_BTD = self._onto(self.cross_attention, x_BTD, added)
        added = self.feed_forward(self._into(self.feed_forward, x_BTD))
        return self._onto(self.feed_forward, x_BTD, added), seen, crossed

    def _into(self, sublayer: AttentionLayer | FeedForwardLayer, x_BTD: Tensor) -> Tensor:
        normed: Tensor = sublayer.norm(x_BTD) if self.pre_norm else x_BTD
        return normed

    def _onto(self, sublayer: AttentionLayer | FeedForwardLayer, x_BTD: Tensor, added_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(added_BTD)
        normed: Tensor = x_BTD if self.pre_norm else sublayer.norm(x_BTD)
        return normed
