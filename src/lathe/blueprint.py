"""Every parameter of an architecture: its name, the named axis of each dimension, and its role.

This list is what the rest of Lathe reads: the planner adds it up, the modules are built to it, family
adapters map its names to Hugging Face's, and reshaping cuts, rotates or grows along an axis without
knowing a family. It is plain Python and takes milliseconds for the largest models.

Axes. An axis has a name (`vocab`, `residual`, `embed`, `heads`, `kv_heads`, `ffn`, `positions`, …) and a
group. Dimensions of one group share one index: keep channel 7 of one and you keep channel 7 of all.
`residual` is one group for the whole model; `ffn` is a group for each feed-forward. `unit` is how many
entries belong together (a head's `d_head`).

Roles, with respect to the stream that the blocks read from and add to:
- `table`   rows that are looked up; it writes its second axis into the stream
- `writer`  adds its output (first axis) to the stream
- `reader`  consumes a norm's output (last axis); `norm` names that norm
- `scale`, `shift`  a norm's weight and bias
- `constant`  stored, not trained

Weights are `out × in`, as in MATH-style `y = W x`. A bias has the role of the weight it belongs to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from lathe.architecture import Architecture, Norm, Stack

COMPONENTS = (
    "token_embedding",
    "positions",
    "attention",
    "cross_attention",
    "feed_forward",
    "norms",
    "head",
)


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter."""

    name: str
    size: int
    group: str
    unit: int = 1


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model, or one more use of it when `tied_to` names the tensor it is."""

    name: str
    axes: tuple[Axis, ...]
    role: str
    component: str
    norm: str | None = None  # readers: the norm whose output they consume; None: the raw stream
    tied_to: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        product = 1
        for axis in self.axes:
            product *= axis.size
        return product

    @property
    def trained(self) -> bool:
        """Whether training changes it."""
        return self.role != "constant"

    @property
    def is_bias(self) -> bool:
        """Whether it is a linear layer's bias."""
        return self.name.endswith(".bias") and self.role in ("reader", "writer")


@functools.lru_cache(maxsize=64)
def blueprint(architecture: Architecture) -> tuple[Parameter, ...]:
    """Every parameter of `architecture`, in the order in which tokens meet them.

    >>> import lathe
    >>> [p.shape for p in blueprint(lathe.preset("gpt2")) if p.name == "embedding.tokens.weight"]
    [(50257, 768)]
    """
    return tuple(_Draft(architecture).parameters())


def stored(architecture: Architecture) -> tuple[Parameter, ...]:
    """The parameters that exist as tensors: the blueprint without the second uses of tied ones."""
    return tuple(p for p in blueprint(architecture) if p.tied_to is None)


def count(architecture: Architecture) -> int:
    """How many trained numbers the architecture has, tied tensors counted once."""
    return sum(p.size for p in stored(architecture) if p.trained)


class _Draft:
    def __init__(self, architecture: Architecture) -> None:
        self.a = architecture
        self.residual = Axis("residual", architecture.d_model, "residual")
        factorised = architecture.embedding.d_embed is not None
        self.embed = Axis("embed", architecture.width, "embed") if factorised else self.residual
        self.vocab = Axis("vocab", architecture.embedding.vocab_size, "vocab")

    def parameters(self) -> Iterator[Parameter]:
        yield from self._embedding()
        for name, stack in self.a.stacks:
            yield from self._stack(name, stack)
        yield from self._head()

    def _embedding(self) -> Iterator[Parameter]:
        yield Parameter("embedding.tokens.weight", (self.vocab, self.embed), "table", "token_embedding")
        if self.embed is not self.residual:
            yield Parameter(
                "embedding.projection.weight",
                (self.residual, self.embed),
                "writer",
                "token_embedding",
                self._input_norm(),
            )
            if self.a.embedding.projection_bias:
                yield Parameter("embedding.projection.bias", (self.residual,), "writer", "token_embedding")

    def _input_norm(self) -> str | None:
        # The lifting matrix reads the input norm's output. One matrix serves both stacks, so a norm is
        # named only where every stack has the same one, that is, where there is one stack.
        stacks = list(self.a.stacks)
        return f"{stacks[0][0]}.input.norm" if len(stacks) == 1 and stacks[0][1].input_norm else None

    def _stack(self, name: str, stack: Stack) -> Iterator[Parameter]:
        yield from self._input(name, stack)
        if stack.positions.kind == "relative":
            buckets = Axis("buckets", stack.positions.n_buckets, f"{name}.buckets")
            heads = Axis("head", stack.attention.n_heads, f"{name}.relative_bias.heads")
            yield Parameter(f"{name}.relative_bias.weight", (buckets, heads), "table", "positions")
        for index in range(stack.n_attentions):
            yield from self._attention(name, "attention", index, stack)
            if stack.cross_attention:
                yield from self._attention(name, "cross_attention", index, stack)
        for index in range(stack.n_feed_forwards):
            yield from self._feed_forward(name, index, stack)
        if stack.final_norm:
            yield from self._norm(f"{name}.norm", stack.norm, self.residual)

    def _input(self, name: str, stack: Stack) -> Iterator[Parameter]:
        if stack.positions.kind == "learned":
            rows = (stack.positions.max_positions or 0) + stack.positions.offset
            axis = Axis("positions", rows, f"{name}.positions")
            yield Parameter(f"{name}.input.positions.weight", (axis, self.embed), "table", "positions")
        if self.a.embedding.token_types and name == next(self.a.stacks)[0]:
            axis = Axis("token_types", self.a.embedding.token_types, "token_types")
            yield Parameter(f"{name}.input.token_types.weight", (axis, self.embed), "table", "token_embedding")
        if stack.input_norm:
            yield from self._norm(f"{name}.input.norm", stack.norm, self.embed)

    def _norm(self, name: str, norm: Norm, axis: Axis, component: str = "norms") -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (axis,), "scale", component)
        if norm.bias:
            yield Parameter(f"{name}.bias", (axis,), "shift", component)

    def _attention(self, stack_name: str, kind: str, index: int, stack: Stack) -> Iterator[Parameter]:
        prefix, a = f"{stack_name}.{kind}.{index}", stack.attention
        queries = Axis("heads", a.d_q, f"{prefix}.heads", a.d_head)
        group = f"{prefix}.heads" if a.kv_heads == a.n_heads else f"{prefix}.kv_heads"
        keys = Axis("kv_heads", a.d_kv, group, a.d_head)
        own = f"{prefix}.norm" if stack.norm_position == "pre" else None
        source = own if kind == "attention" else self._memory_norm()
        for letter, axis, norm in (("q", queries, own), ("k", keys, source), ("v", keys, source)):
            yield from _linear(f"{prefix}.{letter}", axis, self.residual, "reader", kind, a.bias, norm)
        yield from _linear(f"{prefix}.o", self.residual, queries, "writer", kind, a.output_bias)
        yield from self._norm(f"{prefix}.norm", stack.norm, self.residual)

    def _memory_norm(self) -> str | None:
        encoder = self.a.encoder
        return "encoder.norm" if encoder is not None and encoder.final_norm else None

    def _feed_forward(self, stack_name: str, index: int, stack: Stack) -> Iterator[Parameter]:
        prefix, f = f"{stack_name}.feed_forward.{index}", stack.feed_forward
        inner = Axis("ffn", f.d_ff, f"{prefix}.ffn")
        norm = f"{prefix}.norm" if stack.norm_position == "pre" else None
        for part in ("gate", "up") if f.gated else ("up",):
            yield from _linear(f"{prefix}.{part}", inner, self.residual, "reader", "feed_forward", f.bias, norm)
        yield from _linear(f"{prefix}.down", self.residual, inner, "writer", "feed_forward", f.bias)
        yield from self._norm(f"{prefix}.norm", stack.norm, self.residual)

    def _head(self) -> Iterator[Parameter]:
        name, stack = list(self.a.stacks)[-1]
        last = f"{name}.norm" if stack.final_norm else None
        if self.a.head.language is not None:
            yield from self._language_head(last, stack)
        if self.a.head.pooler is not None and self.a.head.pooler.activation is not None:
            pooled = Axis("pooled", self.a.d_model, "pooled")
            yield from _linear("head.pooler", pooled, self.residual, "reader", "head", True, last)
            labels_in, labels_norm = pooled, None
        else:
            labels_in, labels_norm = self.residual, last
        if self.a.head.classifier is not None:
            labels = Axis("labels", self.a.head.classifier.n_labels, "labels")
            bias = self.a.head.classifier.bias
            yield from _linear("head.classifier", labels, labels_in, "reader", "head", bias, labels_norm)

    def _language_head(self, last: str | None, stack: Stack) -> Iterator[Parameter]:
        head = self.a.head.language
        assert head is not None
        factorised = self.embed is not self.residual
        source, inner = last, self.residual
        if head.transform is not None:
            inner = self.embed if factorised else Axis("transform", self.a.d_model, "transform")
            yield from _linear("head.language.transform", inner, self.residual, "reader", "head", True, last)
            yield from self._norm("head.language.norm", stack.norm, inner, "head")
            source = "head.language.norm"
        elif factorised:
            inner = self.embed
            yield from _linear("head.language.projection", inner, self.residual, "reader", "head", False, last)
            source = None
        tied = "embedding.tokens.weight" if head.tied else None
        # A tied table is read along the axis that it writes, whatever the hidden state's axis is called.
        axes = (self.vocab, self.embed if head.tied else inner)
        yield Parameter("head.language.output.weight", axes, "reader", "head", source, tied)
        if head.bias:
            yield Parameter("head.language.output.bias", (self.vocab,), "reader", "head")
        if head.offset:
            yield Parameter("head.language.offset", (self.vocab,), "constant", "head")


def _linear(
    name: str, out: Axis, into: Axis, role: str, component: str, bias: bool, norm: str | None = None
) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (out, into), role, component, norm)
    if bias:
        yield Parameter(f"{name}.bias", (out,), role, component, norm)


__all__ = ["COMPONENTS", "Axis", "Parameter", "blueprint", "count", "stored"]
