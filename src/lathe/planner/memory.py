"""How many bytes a model needs: on disk, in the key-value cache, while it trains and while it answers.

Training holds, in float32, the weights, a gradient for each and whatever the optimiser remembers (AdamW two
moments; Kingma & Ba 2015), and between forward and backward the activations (`lathe.planner.activations`).
Gradients appear while activations go, so the peak is not their sum. It is the largest of
- the loss: activations, and two more tensors of logits for the gradient of the softmax;
- the end of the backward pass: all gradients, and a tied table's parts until they are added up;
- with checkpointing, the recomputation of one layer beside the gradients that are there by then.

What the formulas leave out: the Python process with its libraries (a few hundred MB), padding masks and packed
rows, and the allocator's waste. docs/planning.md holds them against measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe.architecture import Architecture, Stack
from lathe.blueprint import Parameter, count, stored
from lathe.errors import RequestError
from lathe.planner.activations import FLOAT, Activations, activations

# Bits of one weight. A quantised matrix has a 16-bit scale for each row (int8) or each 32 numbers of a row
# (int4); vectors and scales stay at 16 bits.
DTYPES = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
CACHE_DTYPES = ("float32", "bfloat16", "int8")
_INT4_GROUP = 32

# Numbers that an optimiser remembers for each weight.
OPTIMIZERS = {"adamw": 2, "momentum": 1, "sgd": 0}


def checkpoint_bytes(architecture: Architecture) -> dict[str, int]:
    """The bytes of the stored tensors in each data type, tied ones once; a file's header adds a few KB."""
    return {dtype: sum(_stored_bytes(p, dtype) for p in stored(architecture)) for dtype in DTYPES}


def _stored_bytes(parameter: Parameter, dtype: str) -> int:
    if DTYPES[dtype] >= 16:
        return parameter.size * DTYPES[dtype] // 8
    if len(parameter.axes) < 2:
        return parameter.size * 2
    rows, columns = parameter.shape
    if dtype == "int8":
        return rows * columns + rows * 2
    groups = -(-columns // _INT4_GROUP)
    return rows * (-(-columns // 2) + groups * 2)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of keys and values, by data type.

    Attributes:
        per_token: for each token that the decoder has read or written.
        per_source_token: for each token of the source, kept for cross-attention until the answer ends.
    """

    per_token: dict[str, int]
    per_source_token: dict[str, int]

    def total(self, dtype: str, tokens: int, source: int) -> int:
        """The cache of one row."""
        return self.per_token[dtype] * tokens + self.per_source_token[dtype] * source


def cache_bytes(architecture: Architecture) -> CacheBytes:
    """What generation keeps: a key and a value for each layer as executed and each key-value head.

    Layers that share weights keep keys and values of their own. An encoder alone keeps nothing.
    """
    stack = architecture.decoder
    numbers = 0 if stack is None else 2 * stack.n_layers * stack.attention.d_kv
    crossing = numbers if stack is not None and stack.cross_attention else 0
    return CacheBytes(
        {dtype: numbers * DTYPES[dtype] // 8 for dtype in CACHE_DTYPES},
        {dtype: crossing * DTYPES[dtype] // 8 for dtype in CACHE_DTYPES},
    )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step in float32 needs.

    Attributes:
        weights, gradients, optimizer: what is there whatever the batch.
        activations: what is kept from forward to backward.
        total: the peak, without checkpointing.
        total_checkpointed: the peak with activation checkpointing.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: Activations
    total: int
    total_checkpointed: int


def training_memory(architecture: Architecture, batch: int, length: int, optimizer: str = "adamw") -> TrainingMemory:
    """The memory of one training step over `batch` rows of `length` tokens (source and target alike).

    Raises:
        RequestError: an optimiser that is not of `OPTIMIZERS`.
    """
    if optimizer not in OPTIMIZERS:
        raise RequestError(f"optimizer={optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    trained = count(architecture) * FLOAT
    weights = sum(p.size for p in stored(architecture)) * FLOAT
    moments = OPTIMIZERS[optimizer] * trained
    kept = activations(architecture, batch, length)
    grown = _Gradients.of(architecture)
    ends = grown.at_the_end()
    softmax = 2 * kept.logits
    recomputing = _recomputing(architecture, kept, grown, batch, length)
    return TrainingMemory(
        weights=weights,
        gradients=trained,
        optimizer=moments,
        activations=kept,
        total=weights + moments + max(kept.total + softmax, ends),
        total_checkpointed=weights + moments + max(kept.body + kept.head + kept.inputs + softmax, recomputing, ends),
    )


@dataclass(frozen=True)
class _Gradients:
    """Bytes of the gradients, in the order in which the backward pass makes them.

    Attributes:
        total: all of them, a tied table once.
        head: those that are there before the first layer: the head's, and a tied table's first part.
        layers: those of each stack's layers.
        table: the token table's, where it is tied; its parts wait for each other, and then for their sum.
        largest: the largest matrix of a layer.
    """

    total: int
    head: int
    layers: dict[str, int]
    table: int
    largest: int

    @classmethod
    def of(cls, architecture: Architecture) -> _Gradients:
        language = architecture.head.language
        tied = language is not None and language.tied
        table = architecture.embedding.vocab_size * architecture.width if tied else 0
        trained = [p for p in stored(architecture) if p.trained]
        layered = {name: [p for p in trained if _in_layers(p, name)] for name, _ in architecture.stacks}
        return cls(
            total=sum(p.size for p in trained) * FLOAT,
            head=(table + sum(p.size for p in trained if p.component == "head")) * FLOAT,
            layers={name: sum(p.size for p in each) * FLOAT for name, each in layered.items()},
            table=table * FLOAT,
            largest=max(p.size for each in layered.values() for p in each) * FLOAT,
        )

    def at_the_end(self) -> int:
        """The most that stands side by side when the last gradients arrive.

        Two parts of a tied table's gradient are added into a third; a further part (both stacks read the
        table) is added in place.
        """
        first, *rest = self.layers
        if not rest:
            return self.total + 2 * self.table
        return max(self.total + self.table, self.total - self.layers[first] + 2 * self.table)


def _in_layers(parameter: Parameter, stack: str) -> bool:
    return parameter.name.startswith((f"{stack}.attention.", f"{stack}.cross_attention.", f"{stack}.feed_forward."))


def _recomputing(architecture: Architecture, kept: Activations, grown: _Gradients, batch: int, length: int) -> int:
    """The most that stands side by side while layers are recomputed: the first one or the last of a stack."""
    most, gradients, waiting = 0, grown.head, kept.inputs
    for each in reversed(kept.stacks):
        stack: Stack = getattr(architecture, each.name)
        own = grown.layers[each.name]
        unique = max(stack.n_attentions, stack.n_feed_forwards)
        layer = each.layer + _layer_gradients(stack, batch, length) + each.shared  # and the bias's gradient
        first = waiting + gradients + layer
        if unique < stack.n_layers:
            first += own + grown.largest  # shared: every layer's gradient is added to the one before
        waiting -= (each.n_layers - 1) * each.input
        last = waiting + gradients + own - own // unique + layer
        most = max(most, first, last)
        gradients += own
        waiting -= each.input + each.shared
    return kept.body + most


def _layer_gradients(stack: Stack, batch: int, length: int) -> int:
    """The gradients that stand at once inside a layer: of the inner channels, or of queries, keys and values."""
    return batch * length * max(stack.feed_forward.d_ff, 3 * stack.attention.d_q) * FLOAT


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes that an answer in float32 needs.

    Attributes:
        weights: the stored tensors.
        cache: keys and values of all rows.
        workspace: the largest set of intermediate tensors while the prompt is read.
    """

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace


def inference_memory(architecture: Architecture, batch: int, length: int) -> InferenceMemory:
    """The memory of reading `batch` rows of `length` tokens, and for a decoder of keeping them in the cache."""
    weights = sum(p.size for p in stored(architecture)) * FLOAT
    cache = batch * cache_bytes(architecture).total("float32", length, length)
    return InferenceMemory(weights, cache, _workspace(architecture, batch, length))


def _workspace(architecture: Architecture, batch: int, length: int) -> int:
    tokens = batch * length
    # The callers hold the embeddings, alone and with positions added, and the stream before and after a norm.
    held = tokens * (2 * architecture.width + 2 * architecture.d_model)
    layers = max(_layer_workspace(architecture, stack, batch, length) for _, stack in architecture.stacks)
    head, language = 0, architecture.head.language
    if language is not None:
        head = tokens * architecture.embedding.vocab_size * (2 if language.offset else 1)
    return (held + max(layers, head)) * FLOAT


def _layer_workspace(architecture: Architecture, stack: Stack, batch: int, length: int) -> int:
    """Floats inside one layer: queries, keys, values and scores, or the feed-forward's inner channels."""
    tokens, a = batch * length, stack.attention
    bias = 0
    if stack.positions.kind == "relative":
        # Rows of a cache may stand at different places, so there each has a bias of its own.
        bias = (batch if stack is architecture.decoder else 1) * a.n_heads * length**2
    mask = batch * length**2 if stack is architecture.decoder else 0
    repeated = 2 * a.d_q if a.kv_heads < a.n_heads else 0  # keys and values, once for every query head
    attention = tokens * (2 * a.d_q + 2 * a.d_kv + repeated) + (3 * bias if bias else mask)
    feed_forward = tokens * (3 if stack.feed_forward.gated else 2) * stack.feed_forward.d_ff + bias
    return max(attention, feed_forward)
