"""What the backward pass needs kept: the activations of one training step, counted tensor by tensor.

Autograd keeps, for each operation, the tensors that its gradient is made of: a linear layer its input, a
norm its input and statistics, an activation its input (relu and tanh their output), a dropout its mask,
attention its queries, keys, values and output. Korthikanti et al. (2022, §4.1) add these up for one layer
of one model in half precision; here the sum is taken over every choice that an architecture has, in
float32, as `lathe.model` runs it.

Attention is fused on the way through where it can be: then its T × S weights are never kept. PyTorch's CPU
kernel cannot fuse attention that drops weights out, or that adds a bias which is trained (T5's relative
positions): there the weights are kept, three times over with dropout, and soon outweigh everything else.
The count therefore says how many bytes are weights. Fused kernels of accelerators take dropout and biases,
and would keep none of them.

Checkpointing (Chen et al. 2016) keeps the input of each layer and recomputes the rest, one layer at a time.

Shape letters as elsewhere: B batch, T tokens, S tokens of the source, D d_model, E width of the token
table, F d_ff, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lathe.architecture import Architecture, FeedForward, Norm, Stack

FLOAT, LONG, BOOL = 4, 8, 1

# Tensors of the feed-forward's inner width that an activation keeps beside its output. relu and tanh keep
# the output itself; quick_gelu is two operations.
_KEPT_BESIDE_OUTPUT = {"relu": 0, "tanh": 0, "gelu": 1, "gelu_tanh": 1, "silu": 1, "quick_gelu": 2}
_KEEPS_OUTPUT = ("relu", "tanh")


@dataclass(frozen=True)
class StackActivations:
    """What one stack's layers keep.

    Attributes:
        name: encoder or decoder.
        n_layers: how many layers are executed.
        layer: bytes of one layer.
        input: bytes of one layer's input, all that checkpointing keeps of it.
        shared: bytes of the relative bias that every layer is given; it lives on where layers are recomputed.
    """

    name: str
    n_layers: int
    layer: int
    input: int
    shared: int


@dataclass(frozen=True)
class Activations:
    """Bytes that one training step keeps from its forward to its backward pass.

    Attributes:
        by_component: bytes of each part; a norm's are counted under `norms`.
        attention_weights: how many of them are T × S attention weights, which a fused kernel does not keep.
        stacks: the layers, stack by stack.
        body: bytes that are kept outside the layers and the head: embeddings, last norms.
        head: bytes that the head and the loss keep; they are the first to go.
        logits: bytes of one tensor of logits; the loss and its gradient hold two more of it for a moment.
    """

    by_component: dict[str, int]
    attention_weights: int
    stacks: tuple[StackActivations, ...]
    body: int
    head: int
    logits: int

    @property
    def total(self) -> int:
        """Everything that is kept without checkpointing."""
        return sum(self.by_component.values())

    @property
    def inputs(self) -> int:
        """What checkpointing keeps of all layers together."""
        return sum(each.n_layers * each.input + each.shared for each in self.stacks)

    @property
    def checkpointed(self) -> int:
        """What is kept with checkpointing while one layer, the largest, is recomputed."""
        return self.body + self.head + self.inputs + max(each.layer for each in self.stacks)


def activations(architecture: Architecture, batch: int, length: int) -> Activations:
    """What one step keeps for `batch` rows of `length` tokens, none of them padding.

    An encoder-decoder reads `length` source tokens and predicts `length` target tokens.
    """
    count = _Count(architecture, batch, length)
    for name, stack in architecture.stacks:
        count.stack(name, stack)
    count.last()
    return count.result()


@dataclass
class _Kept:
    """Bytes kept by one piece, by component, and how many of them are attention weights."""

    bytes: dict[str, int] = field(default_factory=dict)
    weights: int = 0

    def add(self, component: str, floats: int, size: int = FLOAT) -> None:
        self.bytes[component] = self.bytes.get(component, 0) + floats * size

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class _Count:
    """Adds up one training step of `batch` × `length` tokens."""

    def __init__(self, architecture: Architecture, batch: int, length: int) -> None:
        self.a, self.batch, self.length = architecture, batch, length
        self.n = batch * length
        self.body, self.head = _Kept(), _Kept()
        self.layers: list[tuple[str, Stack, _Kept]] = []

    def result(self) -> Activations:
        total = _Kept(dict(self.body.bytes))
        for component, kept in self.head.bytes.items():
            total.add(component, kept, 1)
        for _, stack, layer in self.layers:
            for component, kept in layer.bytes.items():
                total.add(component, stack.n_layers * kept, 1)
        vocab = self.a.embedding.vocab_size if self.a.head.language is not None else 0
        return Activations(
            by_component=total.bytes,
            attention_weights=sum(stack.n_layers * layer.weights for _, stack, layer in self.layers),
            stacks=tuple(self._stack_kept(*each) for each in self.layers),
            body=self.body.total,
            head=self.head.total,
            logits=self.n * vocab * FLOAT,
        )

    def _stack_kept(self, name: str, stack: Stack, layer: _Kept) -> StackActivations:
        relative = stack.positions.kind == "relative"
        bias = stack.attention.n_heads * self.length**2 * FLOAT if relative else 0
        return StackActivations(name, stack.n_layers, layer.total, self.n * self.a.d_model * FLOAT, bias)

    def stack(self, name: str, stack: Stack) -> None:
        """The stack's input, its positions, its layers, its last norm and its output."""
        self._input(name, stack)
        fused = _fused(self.a, stack)
        layer = _Kept()
        self._sublayer(layer, "attention", stack)
        self._attention(layer, "attention", stack, fused)
        self._mask(layer, stack, fused)
        if stack.cross_attention:
            self._sublayer(layer, "cross_attention", stack)
            self._attention(layer, "cross_attention", stack, self.a.dropout.attention == 0)
        self._sublayer(layer, "feed_forward", stack)
        layer.add("feed_forward", self.n * inner_kept(stack.feed_forward, self.a.dropout.activation > 0))
        self.layers.append((name, stack, layer))
        if stack.final_norm:
            self._norm(self.body, stack.norm, self.a.d_model)
        if self.a.dropout.output > 0:
            self.body.add("norms", self.n * self.a.d_model)
        if name == "encoder" and self.a.decoder is not None:
            self.body.add("cross_attention", self.n * self.a.d_model)  # the memory that every k and v reads

    def _input(self, name: str, stack: Stack) -> None:
        width, kept = self.a.width, self.body
        kept.add("token_embedding", self.n, LONG)
        if self.a.embedding.token_types and name == next(self.a.stacks)[0]:
            kept.add("token_embedding", self.n, LONG)
        if stack.positions.kind == "learned":
            kept.add("positions", self.n, LONG)
        if stack.positions.kind == "rotary":
            kept.add("positions", 2 * self.n * stack.attention.d_head)  # cosines and sines
        if stack.positions.kind == "relative":
            kept.add("positions", self.length**2, LONG)  # which bucket each pair falls into
        if stack.input_norm:
            self._norm(kept, stack.norm, width)
        if self.a.dropout.embedding > 0:
            kept.add("token_embedding", self.n * width)
        if self.a.embedding.d_embed is not None:
            kept.add("token_embedding", self.n * width)

    def _norm(self, kept: _Kept, norm: Norm, width: int, component: str = "norms") -> None:
        # LayerNorm: its input, a mean and a deviation for each token. RMSNorm is written out: its input,
        # one root for each token, and the normed input that the weight multiplies.
        kept.add(component, self.n * (width + 2 if norm.kind == "layer" else 2 * width + 1))

    def _sublayer(self, kept: _Kept, component: str, stack: Stack) -> None:
        """The norm, the input of the first linear layers and the mask of the dropout before the addition."""
        self._norm(kept, stack.norm, self.a.d_model)
        kept.add(component, self.n * self.a.d_model)
        if self.a.dropout.hidden > 0:
            kept.add(component, self.n * self.a.d_model)

    def _attention(self, kept: _Kept, component: str, stack: Stack, fused: bool) -> None:
        spec = stack.attention
        if fused:
            kept.add(component, self.n * (2 * spec.d_q + 2 * spec.d_kv))  # q, k, v and the output
            kept.add(component, self.n * spec.n_heads)  # each row's log of the sum of exponentials
            return
        # Written out: q and k scaled, v as one block, the input of the output layer; grouped heads repeated.
        kept.add(component, self.n * 4 * spec.d_q)
        copies = 3 if self.a.dropout.attention > 0 else 1  # the softmax, and the mask and what it leaves
        weights = copies * self.batch * spec.n_heads * self.length**2 * FLOAT
        kept.add(component, weights, 1)
        kept.weights += weights

    def _mask(self, kept: _Kept, stack: Stack, fused: bool) -> None:
        """The causal mask or window where it has to be a tensor; the fused kernel and its stand-in need none."""
        pairs = self.length**2
        window = stack.attention.window
        if stack.positions.kind == "relative":
            if stack.causal:
                kept.add("attention", pairs, BOOL)
        elif window is not None and window < self.length and fused:
            kept.add("attention", pairs)

    def last(self) -> None:
        """The last hidden states, what the heads make of them, and the loss."""
        head, kept, d = self.a.head, self.head, self.a.d_model
        stack = list(self.a.stacks)[-1][1]
        pooler = head.pooler
        pooled = pooler is not None and (pooler.activation is not None or head.classifier is not None)
        # A dense layer, or a classifier without dropout before it, reads the hidden states themselves.
        read = pooler is not None and (pooler.activation is not None or self.a.dropout.classifier == 0)
        whole = pooled and read and pooler is not None and pooler.token in ("first", "each")
        scaled = head.language is not None and head.language.scaled
        if head.language is not None or whole:
            kept.add("head", self.n * d * (2 if scaled and whole else 1))
        if pooled:
            self._pooled(kept)
        if head.language is None:
            return
        width, rows = self.a.width, self.n
        if head.language.transform is not None:
            beside = _KEPT_BESIDE_OUTPUT[head.language.transform]
            kept.add("head", self.n * width * (beside + 1))  # the norm's output, which the table reads
            self._norm(kept, stack.norm, width, "head")
        elif self.a.embedding.d_embed is not None:
            kept.add("head", self.n * width)
        if self.a.encoder is None:
            rows -= self.batch  # the last token of each row predicts nothing
        kept.add("head", rows * self.a.embedding.vocab_size)
        kept.add("head", rows, LONG)

    def _pooled(self, kept: _Kept) -> None:
        """The pooler's activation and what the classifier reads."""
        head, d = self.a.head, self.a.d_model
        assert head.pooler is not None
        rows = self.n if head.pooler.token == "each" else self.batch
        dropout = head.classifier is not None and self.a.dropout.classifier > 0
        tensors = 2 if dropout else 0  # the mask and what it leaves
        if head.pooler.activation is None:
            tensors += head.pooler.token not in ("first", "each")  # the picked states; otherwise the hidden ones
        else:
            read = head.classifier is not None and not dropout
            output = read or head.pooler.activation in _KEEPS_OUTPUT
            tensors += _KEPT_BESIDE_OUTPUT[head.pooler.activation] + output
            tensors += head.pooler.token not in ("first", "each")
        kept.add("head", rows * d * tensors)


def inner_kept(spec: FeedForward, dropout: bool) -> int:
    """How many numbers a feed-forward keeps of one token, its input left out."""
    kept = _KEPT_BESIDE_OUTPUT[spec.activation]
    if spec.gated:
        # The activated half and the linear one, and their product; with dropout, its mask and what it leaves.
        kept += 2 + (2 if dropout else 1)
    else:
        needed = spec.activation in _KEEPS_OUTPUT or not dropout
        kept += (1 if needed else 0) + (2 if dropout else 0)
    return kept * spec.d_ff


def _fused(architecture: Architecture, stack: Stack) -> bool:
    return architecture.dropout.attention == 0 and stack.positions.kind != "relative"
