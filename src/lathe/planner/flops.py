"""How much a model computes: the matrix operations of a forward pass, counted exactly.

A product of an m × k with a k × n matrix is 2·m·n·k floating-point operations, a multiplication and an
addition each. A weight of the blueprint that holds N numbers thus costs 2·N for each token that passes
through it; attention adds 2·T·S·n_heads·d_head for the scores and as many for the weighted sum (T queries,
S keys). Norms, activations, softmax and table look-ups are left out: they are about a hundredth, and what
`torch.utils.flop_counter` counts leaves them out too. A causal mask is counted as the full T × S, as there.

Layers are counted as they are executed. A stack that shares its weights (ALBERT §3.1) has fewer parameters
and computes exactly as much.

Three passes are counted:
- `forward`: the whole model over `length` tokens, a prediction at each; a training step is three of these
  (backward is twice forward; Kaplan et al. 2020, §2.1), four with activation checkpointing.
- `prefill`: what stands before the first new token. A decoder reads its prompt and predicts once; an
  encoder-decoder reads its source, keeps the cross-attention's keys and values, and takes one step.
- `decode`: one more token, with `length` tokens (itself included) in its context and as many in the source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lathe.architecture import Architecture, Stack
from lathe.blueprint import COMPONENTS, Parameter, blueprint

_LATER = re.compile(r"\.[1-9][0-9]*\.")


@dataclass(frozen=True)
class Flops:
    """The matrix operations of one pass.

    Attributes:
        tokens: how many tokens the pass read, both stacks together.
        by_component: operations of each of the blueprint's components; those without any are 0.
    """

    tokens: int
    by_component: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_component.values())

    @property
    def per_token(self) -> float:
        """The pass spread over its tokens."""
        return self.total / self.tokens


def forward(architecture: Architecture, length: int, source: int | None = None) -> Flops:
    """One sequence through the whole model, with predictions at every position.

    Args:
        length: tokens; the target's where there is an encoder and a decoder.
        source: tokens that the encoder reads; `length` where left out.
    """
    count = _Counter(architecture)
    source = length if source is None else source
    if architecture.encoder is None:
        count.decoder(length, length, 0, 0)
        count.head(length)
        return count.flops(length)
    if architecture.decoder is None:
        count.encoder(length)
        count.head(length)
        return count.flops(length)
    count.encoder(source)
    count.decoder(length, length, source, source)
    count.head(length)
    return count.flops(length + source)


def prefill(architecture: Architecture, length: int) -> Flops:
    """What stands between a prompt (or source) of `length` tokens and the first prediction."""
    count = _Counter(architecture)
    if architecture.decoder is None:
        return forward(architecture, length)
    if architecture.encoder is None:
        count.decoder(length, length, 0, 0)
    else:
        count.encoder(length)
        count.decoder(1, 1, length, length)
    count.head(1)
    return count.flops(length)


def decode(architecture: Architecture, length: int) -> Flops | None:
    """One more token with `length` in its context; None for an encoder alone, which generates nothing."""
    if architecture.decoder is None:
        return None
    count = _Counter(architecture)
    count.decoder(1, length, length if architecture.encoder is not None else 0, 0)
    count.head(1)
    return count.flops(1)


class _Counter:
    """Adds up one pass."""

    def __init__(self, architecture: Architecture) -> None:
        self.a = architecture
        self.counted = dict.fromkeys(COMPONENTS, 0)
        # One layer of each stack stands for all of them: they have one shape.
        self.matrices = [p for p in blueprint(architecture) if _is_matrix(p) and not _LATER.search(p.name)]

    def flops(self, tokens: int) -> Flops:
        return Flops(tokens, dict(self.counted))

    def encoder(self, tokens: int) -> None:
        stack = self.a.encoder
        assert stack is not None
        self._stack("encoder", stack, tokens, tokens, 0, 0)

    def decoder(self, tokens: int, keys: int, memory: int, new_memory: int) -> None:
        """`tokens` new ones that see `keys`; `memory` source tokens, of which `new_memory` are not in the cache yet."""
        stack = self.a.decoder
        assert stack is not None
        self._stack("decoder", stack, tokens, keys, memory, new_memory)

    def _stack(self, name: str, stack: Stack, tokens: int, keys: int, memory: int, new_memory: int) -> None:
        layers, inner = stack.n_layers, stack.attention.d_q
        self._add("token_embedding", tokens * self._weights("embedding.projection."))
        self._add("attention", layers * tokens * self._weights(f"{name}.attention.0."))
        self._add("attention", layers * 2 * tokens * keys * inner)
        self._add("feed_forward", layers * tokens * self._weights(f"{name}.feed_forward.0."))
        if stack.cross_attention:
            prefix = f"{name}.cross_attention.0."
            ours = self._weights(f"{prefix}q.") + self._weights(f"{prefix}o.")
            theirs = self._weights(f"{prefix}k.") + self._weights(f"{prefix}v.")
            self._add("cross_attention", layers * (tokens * ours + new_memory * theirs))
            self._add("cross_attention", layers * 2 * tokens * memory * inner)

    def head(self, positions: int) -> None:
        """The heads: token logits at `positions` places, a pooled state once for the sequence (or at each place)."""
        self._add("head", positions * self._weights("head.language."))
        pooler = self.a.head.pooler
        pooled = positions if pooler is not None and pooler.token == "each" else 1
        self._add("head", pooled * (self._weights("head.pooler.") + self._weights("head.classifier.")))

    def _weights(self, prefix: str) -> int:
        """How many numbers the matrices under `prefix` hold: a token passes through each once."""
        return sum(p.size for p in self.matrices if p.name.startswith(prefix))

    def _add(self, component: str, products: int) -> None:
        self.counted[component] += 2 * products


def _is_matrix(parameter: Parameter) -> bool:
    return parameter.role in ("reader", "writer") and len(parameter.axes) == 2
