"""A stack of layers: an encoder or a decoder, from embeddings to hidden states.

The stack holds its different attentions and feed-forwards once each; `Stack.attention_index` and
`feed_forward_index` of the architecture say which of them a layer uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lathe.architecture import Architecture, Stack
from lathe.model.attention import AttentionLayer, hide
from lathe.model.block import Layer, Surroundings
from lathe.model.cache import Cache
from lathe.model.embedding import Embedding, StackInput
from lathe.model.feed_forward import FeedForwardLayer
from lathe.model.mask import Mask, cached_mask, memory_mask, self_mask
from lathe.model.norm import make_norm
from lathe.model.positions import RelativeBias, rotation


@dataclass(frozen=True)
class Memory:
    """An encoder's output and what of it may be seen."""

    hidden_BSD: Tensor
    padding_BS: Tensor | None = None
    segments_BS: Tensor | None = None


@dataclass
class Trace:
    """Hidden states and attention weights, gathered layer by layer when asked for.

    Args:
        hidden: whether hidden states are gathered; every layer's would otherwise outlive the layer.
    """

    hidden: bool = False
    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    cross_attentions: list[Tensor] = field(default_factory=list)


class TransformerStack(nn.Module):
    """An encoder or a decoder. `checkpointing` recomputes each layer in the backward pass instead of keeping it."""

    def __init__(self, architecture: Architecture, stack: Stack, *, first: bool) -> None:
        super().__init__()
        d, dropout = architecture.d_model, architecture.dropout
        self.spec = stack
        self.checkpointing = False
        self.input = StackInput(architecture, stack, first=first)
        self.relative_bias: RelativeBias | None = None
        if stack.positions.kind == "relative":
            self.relative_bias = RelativeBias(stack.positions, stack.attention.n_heads, causal=stack.causal)

        def attentions() -> nn.ModuleList:
            norms = [make_norm(stack.norm, d) for _ in range(stack.n_attentions)]
            return nn.ModuleList([AttentionLayer(d, stack, norm, dropout.attention) for norm in norms])

        self.attention = attentions()
        self.cross_attention = attentions() if stack.cross_attention else None
        self.feed_forward = nn.ModuleList(
            [
                FeedForwardLayer(d, stack.feed_forward, make_norm(stack.norm, d), dropout.activation)
                for _ in range(stack.n_feed_forwards)
            ]
        )
        self.norm = make_norm(stack.norm, d) if stack.final_norm else None
        self.dropout = nn.Dropout(dropout.hidden)
        self.output_dropout = nn.Dropout(dropout.output)

    def layer(self, number: int) -> Layer:
        """Layer `number`, which may share its modules with others."""
        a = self.spec.attention_index(number)
        return Layer(
            self.attention[a],  # type: ignore[arg-type]
            None if self.cross_attention is None else self.cross_attention[a],  # type: ignore[arg-type]
            self.feed_forward[self.spec.feed_forward_index(number)],  # type: ignore[arg-type]
            self.spec.norm_position == "pre",
            self.dropout,
        )

    def forward(
        self,
        embedding: Embedding,
        vectors_BTE: Tensor,
        *,
        padding_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segments_BT: Tensor | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        trace: Trace | None = None,
        weights: bool = False,
    ) -> Tensor:
        """Hidden states of the last layer, B × T × D.

        Args:
            embedding: whose lifting matrix is used, where there is one.
            vectors_BTE: token vectors.
            padding_BT: 1 for a token, 0 for a pad; with a cache, of the new tokens alone.
            positions_BT: where each token stands; counted from 0, or on from the cache, where left out.
            segments_BT: the document of each token, for packed rows.
            memory: what cross-attention reads.
            trace: filled with every layer's hidden states if it wants them, and attention weights if `weights`.
        """
        x_BTD, around = self.enter(
            embedding,
            vectors_BTE,
            padding_BT=padding_BT,
            positions_BT=positions_BT,
            token_type_ids=token_type_ids,
            segments_BT=segments_BT,
            memory=memory,
            cache=cache,
            weights=weights,
        )
        out_BTD = self.leave(self._run(x_BTD, around, cache, trace))
        if trace is not None and trace.hidden:
            trace.hidden_states.append(out_BTD)
        if cache is not None:
            cache.advance()
        return out_BTD

    def enter(
        self,
        embedding: Embedding,
        vectors_BTE: Tensor,
        *,
        padding_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segments_BT: Tensor | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Surroundings]:
        """The stream before the first layer, B × T × D, and what every layer is given; arguments as in `forward`."""
        length, device = vectors_BTE.shape[1], vectors_BTE.device
        if cache is not None:
            places_BT = cache.place(padding_BT, length)
            keys_S = torch.arange(cache.seen, device=device)
            mask = cached_mask(places_BT, cache.seen, self.spec.attention.window)
        else:
            places_BT = keys_S = torch.arange(length, device=device)
            places_BT = places_BT[None]
            mask = self_mask(
                causal=self.spec.causal,
                padding_BT=padding_BT,
                segments_BT=segments_BT,
                window=self.spec.attention.window,
                length=length,
                device=device,
            )
        if positions_BT is None:
            last = keys_S.shape[0] - 1  # a pad's spare slot is no position
            positions_BT = places_BT.clamp(max=last).expand(vectors_BTE.shape[0], -1)
        x_BTD = self.input(vectors_BTE, positions_BT, token_type_ids)
        if embedding.projection is not None:
            x_BTD = embedding.projection(x_BTD)
        around = self._surroundings(mask, places_BT, keys_S, positions_BT, segments_BT, memory, weights)
        return x_BTD, around

    def leave(self, x_BTD: Tensor) -> Tensor:
        """The stream after the last layer as what reads the stack sees it."""
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        out_BTD: Tensor = self.output_dropout(x_BTD)
        return out_BTD

    def _surroundings(
        self,
        mask: Mask,
        places_BT: Tensor,
        keys_S: Tensor,
        positions_BT: Tensor,
        segments_BT: Tensor | None,
        memory: Memory | None,
        weights: bool,
    ) -> Surroundings:
        spec = self.spec.positions
        around = Surroundings(mask, weights=weights)
        if self.relative_bias is not None:
            # Masked here, once, and not in every layer again.
            bias_BHTS = self.relative_bias(places_BT, keys_S)
            allowed = mask.dense(places_BT.shape[1], len(keys_S), bias_BHTS.device)
            bias_BHTS = bias_BHTS if allowed is None else hide(allowed, bias_BHTS)
            around = replace(around, mask=Mask(), bias_BHTS=bias_BHTS)
        if spec.kind == "rotary":
            around = replace(around, rotation=rotation(positions_BT, spec, self.spec.attention.d_head))
        if memory is not None:
            seen = memory_mask(memory.padding_BS, segments_BT, memory.segments_BS)
            around = replace(around, memory_BSD=memory.hidden_BSD, memory_mask=seen)
        return around

    def _run(self, x_BTD: Tensor, around: Surroundings, cache: Cache | None, trace: Trace | None) -> Tensor:
        recompute = self.checkpointing and torch.is_grad_enabled()
        for number in range(self.spec.n_layers):
            if trace is not None and trace.hidden:
                trace.hidden_states.append(x_BTD)
            layer = self.layer(number)
            if recompute:
                x_BTD, seen, crossed = torch.utils.checkpoint.checkpoint(layer, x_BTD, around, use_reentrant=False)
            elif cache is not None:
                crossing = cache.memory[number] if cache.memory else None
                x_BTD, seen, crossed = layer(x_BTD, around, cache.layers[number], crossing)
            else:
                x_BTD, seen, crossed = layer(x_BTD, around)
            if trace is not None and seen is not None:
                trace.attentions.append(seen)
            if trace is not None and crossed is not None:
                trace.cross_attentions.append(crossed)
        return x_BTD
