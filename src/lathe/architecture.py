"""Every size and every choice of a transformer, as one frozen record without torch.

An `Architecture` is embeddings, an optional encoder stack, an optional decoder stack and a head
(Vaswani et al. 2017, §3). A stack is one block description, repeated: how the block attends, its
feed-forward, its norm and where the norm stands, how positions enter, and which layers share their
weights (ALBERT §3.1). Nothing elsewhere in Lathe decides a shape: `lathe.blueprint` turns this record
into the list of parameters and everything else reads that list.

Families are points in this space. Points that no family occupies (a T5 with a factorised embedding,
a BERT with rotary positions) are as legal as the others.

Names are the field's: `d_model` is the width of the residual stream, `d_embed` the embedding's own
width when it is factorised, `d_head` one head's, `d_ff` the feed-forward's inner width.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lathe.errors import RequestError
from lathe.spec import Spec, choice, share, size, unknown

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh")
POSITIONS = ("none", "learned", "sinusoidal", "rotary", "relative")
STACKS = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class Norm(Spec):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), which drops the mean and the bias."""

    kind: str = choice("layer", "rms", default="layer")
    eps: float = 1e-5
    bias: bool = True  # of LayerNorm; an RMSNorm has none

    def check(self) -> None:
        if not 0.0 <= self.eps < 1.0:
            raise RequestError(f"eps={self.eps}: expected a small number, 0 or more and below 1")
        if self.kind == "rms" and self.bias:
            object.__setattr__(self, "bias", False)


@dataclass(frozen=True, kw_only=True)
class RotaryScaling(Spec):
    """How rotary frequencies are stretched for contexts longer than the ones trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023). `llama3` divides only those whose
    wavelength is long beside the original context and blends the ones between (Llama 3.1).
    """

    kind: str = choice("linear", "llama3")
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = size(2**30, default=8192)

    def check(self) -> None:
        if self.factor < 1.0:
            raise RequestError(f"factor={self.factor}: expected 1 or more")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise RequestError(
                f"high_freq_factor={self.high_freq_factor}: expected more than low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class Positions(Spec):
    """How a stack knows the order of its tokens.

    `learned` and `sinusoidal` add a vector per position to the embedding (Vaswani et al. 2017, §3.5).
    `rotary` turns queries and keys by an angle that grows with the position (Su et al. 2021, §3.2).
    `relative` adds a learned bias per head and distance bucket to the scores (T5, §2.1). `none` adds nothing.
    """

    kind: str = choice(*POSITIONS, default="none")
    max_positions: int | None = size(2**30, default=None)  # rows of a table; the context a rotary model is meant for
    offset: int = size(64, least=0, default=0)  # table rows that stand before position 0 (BART has 2)
    theta: float = 10000.0  # rotary base
    scaling: RotaryScaling | None = None
    n_buckets: int = size(2**16, least=2, default=32)  # relative
    max_distance: int = size(2**20, least=2, default=128)  # relative: farther distances share the last bucket

    def check(self) -> None:
        if self.kind in ("learned", "sinusoidal", "rotary") and self.max_positions is None:
            raise RequestError(f"max_positions=None: {self.kind} positions need a whole number")
        if self.theta <= 0:
            raise RequestError(f"theta={self.theta}: expected more than 0")
        if self.scaling is not None and self.kind != "rotary":
            raise RequestError(f"scaling: only rotary positions scale, not {self.kind}; leave it out")

    @property
    def limit(self) -> int | None:
        """The longest sequence that fits, or None when any length does."""
        return self.max_positions if self.kind in ("learned", "sinusoidal") else None


@dataclass(frozen=True, kw_only=True)
class Attention(Spec):
    """Multi-head attention (Vaswani et al. 2017, §3.2) with grouped key-value heads (GQA, Ainslie et al. 2023).

    `d_head` is free of `d_model`: queries are `n_heads · d_head` wide.
    """

    n_heads: int = size(2**14)
    d_head: int = size(2**16)
    n_kv_heads: int | None = size(2**14, default=None)  # None: as many as n_heads
    bias: bool = True  # of q, k and v
    output_bias: bool = True
    scaled: bool = True  # divide scores by √d_head; T5 does not
    window: int | None = size(2**30, default=None)  # each token sees itself and the window-1 tokens before it

    def check(self) -> None:
        if self.n_kv_heads == self.n_heads:
            object.__setattr__(self, "n_kv_heads", None)  # one way to say it, so that equal models compare equal
        if self.n_heads % self.kv_heads:
            raise RequestError(
                f"n_kv_heads={self.n_kv_heads}: expected a divisor of n_heads={self.n_heads}, "
                "so that every group has as many query heads; set the two together"
            )

    @property
    def kv_heads(self) -> int:
        """How many key-value heads there are."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def d_q(self) -> int:
        """The width of all query heads together."""
        return self.n_heads * self.d_head

    @property
    def d_kv(self) -> int:
        """The width of all key heads together."""
        return self.kv_heads * self.d_head


@dataclass(frozen=True, kw_only=True)
class FeedForward(Spec):
    """`down(act(up(x)))`, or gated `down(act(gate(x)) · up(x))` (Shazeer 2020)."""

    d_ff: int = size(2**24)
    activation: str = choice(*ACTIVATIONS, default="gelu")
    gated: bool = False
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class Sharing(Spec):
    """Which layers of a stack use the same weights (ALBERT §3.1), written as one word.

    `none`; `all`; `attention` (with its norm and cross-attention); `feed_forward`; `groups:G` (G runs of
    consecutive layers, one set of weights each); `cycle:K` (K sets, used in turn); `groups:G,cycle:K`
    (each group cycles through its own K). `attention:` or `feed_forward:` before groups or a cycle shares
    only that half: `feed_forward:groups:3`. Sharing saves parameters and bytes, not computation.
    """

    attention: bool = False
    feed_forward: bool = False
    groups: int = size(2**14, default=1)
    cycle: int = size(2**14, default=1)

    def check(self) -> None:
        if not (self.attention or self.feed_forward) and (self.groups > 1 or self.cycle > 1):
            raise RequestError(
                f"groups={self.groups}, cycle={self.cycle}: nothing is shared; write sharing=groups:{self.groups}, "
                "or set attention or feed_forward to true"
            )

    @classmethod
    def parse(cls, text: str) -> Sharing:
        """Read the written form; `str()` gives it back."""
        what, _, rest = text.strip().lower().replace("ffn", "feed_forward").partition(":")
        halves = {"all": (True, True), "attention": (True, False), "feed_forward": (False, True)}
        if text.strip().lower() == "none":
            return cls()
        attention, feed_forward = halves.get(what, (True, True))
        numbers = {"groups": 1, "cycle": 1}
        parts = (rest if what in halves else text.strip().lower()).split(",")
        for part in [] if text.strip().lower() in ("ffn", *halves) else parts:
            key, _, number = part.partition(":")
            if key not in numbers or not re.fullmatch("[1-9][0-9]{0,5}", number):
                raise RequestError(
                    f"sharing={text!r}: expected none, all, attention, feed_forward, "
                    "groups:G, cycle:K or groups:G,cycle:K"
                )
            numbers[key] = int(number)
        return cls(attention=attention, feed_forward=feed_forward, **numbers)

    def __str__(self) -> str:
        if not (self.attention or self.feed_forward):
            return "none"
        half = "all" if self.attention and self.feed_forward else "attention" if self.attention else "feed_forward"
        counts = [f"{name}:{n}" for name, n in (("groups", self.groups), ("cycle", self.cycle)) if n > 1]
        if not counts:
            return half
        return ",".join(counts) if half == "all" else f"{half}:{','.join(counts)}"

    def check_depth(self, n_layers: int) -> None:
        """Raise `RequestError` where `n_layers` cannot be divided as this pattern asks."""
        if n_layers % self.groups or (n_layers // self.groups) % self.cycle:
            raise RequestError(
                f"sharing={str(self)!r}: {n_layers} layers cannot be split into {self.groups} equal group(s) "
                f"of whole cycles of {self.cycle}; choose numbers that divide {n_layers}"
            )

    def index(self, layer: int, n_layers: int) -> int:
        """Which set of weights `layer` uses when it is shared."""
        per_group = n_layers // self.groups
        return (layer // per_group) * self.cycle + layer % self.cycle


@dataclass(frozen=True, kw_only=True)
class Stack(Spec):
    """One block description, repeated `n_layers` times, and what stands before and after it."""

    n_layers: int = size(2**14)
    attention: Attention
    feed_forward: FeedForward
    norm: Norm = Norm()
    norm_position: str = choice("pre", "post", default="pre")
    input_norm: bool = False  # a norm on the embeddings (BERT, BART)
    final_norm: bool = True  # a norm after the last block (pre-norm stacks)
    positions: Positions = Positions()
    causal: bool = False
    cross_attention: bool = False
    sharing: Sharing = Sharing()

    def check(self) -> None:
        self.sharing.check_depth(self.n_layers)
        if self.positions.kind == "rotary" and self.attention.d_head % 2:
            raise RequestError(f"d_head={self.attention.d_head}: rotary positions turn pairs, so it must be even")
        if self.attention.window is not None and not self.causal:
            raise RequestError(f"window={self.attention.window}: only a causal stack has a window; leave it out")
        if self.positions.kind == "relative":
            self._check_buckets()

    def _check_buckets(self) -> None:
        # A stack that sees both ways has half of the buckets for each side; half of a side's hold one distance
        # each, and the others have to reach farther.
        n_buckets, farthest = self.positions.n_buckets, self.positions.max_distance
        exact = n_buckets // (2 if self.causal else 4)
        if exact < 1:
            raise RequestError(f"n_buckets={n_buckets}: expected 4 or more where tokens see both ways")
        if farthest <= exact:
            raise RequestError(
                f"max_distance={farthest}: expected more than {exact}, the distances that "
                f"n_buckets={n_buckets} give a bucket of their own"
            )

    def attention_index(self, layer: int) -> int:
        """Which attention weights `layer` uses."""
        return self.sharing.index(layer, self.n_layers) if self.sharing.attention else layer

    def feed_forward_index(self, layer: int) -> int:
        """Which feed-forward weights `layer` uses."""
        return self.sharing.index(layer, self.n_layers) if self.sharing.feed_forward else layer

    @property
    def n_attentions(self) -> int:
        """How many different attentions the stack holds."""
        return self.sharing.groups * self.sharing.cycle if self.sharing.attention else self.n_layers

    @property
    def n_feed_forwards(self) -> int:
        """How many different feed-forwards the stack holds."""
        return self.sharing.groups * self.sharing.cycle if self.sharing.feed_forward else self.n_layers


@dataclass(frozen=True, kw_only=True)
class Embedding(Spec):
    """Tokens to vectors. With `d_embed` the table is V × d_embed and a matrix lifts it to d_model (ALBERT §3.1)."""

    vocab_size: int = size(2**24)
    d_embed: int | None = size(default=None)  # None: the table is d_model wide and there is no lifting matrix
    projection_bias: bool = False  # of the lifting matrix
    token_types: int = size(2**16, least=0, default=0)  # BERT's segments A and B
    scaled: bool = False  # multiply token vectors by √width (BART's scale_embedding)


@dataclass(frozen=True, kw_only=True)
class LanguageHead(Spec):
    """Hidden states to token logits."""

    tied: bool = True  # the output table is the embedding table
    transform: str | None = choice(*ACTIVATIONS, default=None)  # dense, this activation and a norm first (BERT)
    bias: bool = False
    scaled: bool = False  # multiply hidden states by d_model^-1/2 first (tied T5)
    offset: bool = False  # a stored constant that is added to the logits and not trained (BART)


@dataclass(frozen=True, kw_only=True)
class Pooler(Spec):
    """Which position stands for the sequence, and an optional dense layer with an activation on it."""

    token: str = choice("first", "last", "eos", "each", default="first")  # `each`: every position on its own
    activation: str | None = choice(*ACTIVATIONS, default=None)  # None: no dense layer


@dataclass(frozen=True, kw_only=True)
class Classifier(Spec):
    """A linear layer from the pooled state to labels."""

    n_labels: int = size(2**20)
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class Head(Spec):
    """What is read off the last stack: token logits, a pooled state, labels; any of them or none."""

    language: LanguageHead | None = None
    pooler: Pooler | None = None
    classifier: Classifier | None = None

    def check(self) -> None:
        if self.classifier is not None and self.pooler is None:
            raise RequestError("head.classifier: a classifier reads a pooled state; add head.pooler")


@dataclass(frozen=True, kw_only=True)
class Tokens(Spec):
    """The token ids that the computation itself needs."""

    pad: int | None = size(2**24, least=0, default=None)
    bos: int | None = size(2**24, least=0, default=None)
    eos: tuple[int, ...] = ()
    decoder_start: int | None = size(2**24, least=0, default=None)
    mask: int | None = size(2**24, least=0, default=None)


@dataclass(frozen=True, kw_only=True)
class Dropout(Spec):
    """Where training drops activations, and with which probability (Srivastava et al. 2014)."""

    hidden: float = share()  # on what each sublayer adds to the residual stream
    attention: float = share()  # on attention weights
    activation: float = share()  # inside the feed-forward
    embedding: float = share()  # on the embeddings
    classifier: float = share()  # on the pooled state
    output: float = share()  # on the last hidden states (T5)


@dataclass(frozen=True, kw_only=True)
class Initialisation(Spec):
    """How untrained weights are drawn.

    `normal`: every matrix from N(0, std²) (BERT, GPT-2, Llama). `fan_in`: from N(0, 1/fan-in), queries
    narrower by √d_head where scores are not scaled, token vectors from N(0, 1) (T5).
    """

    kind: str = choice("normal", "fan_in", default="normal")
    std: float = 0.02
    scaled_residual: bool = False  # writers narrower by √(2·n_layers) (GPT-2 §2.3)

    def check(self) -> None:
        if self.std <= 0:
            raise RequestError(f"std={self.std}: expected more than 0")


# A bare name in `with_` and on the command line, and the fields it sets wherever they exist.
ALIASES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("embedding.vocab_size",),
    "d_embed": ("embedding.d_embed",),
    "token_types": ("embedding.token_types",),
    "tied": ("head.language.tied",),
    "n_labels": ("head.classifier.n_labels",),
    **{
        name: tuple(f"{stack}.{path}" for stack in STACKS)
        for name, path in {
            "n_layers": "n_layers",
            "n_heads": "attention.n_heads",
            "n_kv_heads": "attention.n_kv_heads",
            "d_head": "attention.d_head",
            "window": "attention.window",
            "d_ff": "feed_forward.d_ff",
            "activation": "feed_forward.activation",
            "gated": "feed_forward.gated",
            "sharing": "sharing",
            "norm_position": "norm_position",
            "eps": "norm.eps",
            "max_positions": "positions.max_positions",
        }.items()
    },
}

# What `config.json` files call the same sizes, so that whoever asks by such a name is told ours.
_CONFIG_NAMES: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size", "n_embd"),
    "d_embed": ("embedding_size",),
    "n_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "n_heads": ("num_attention_heads", "num_heads", "n_head"),
    "n_kv_heads": ("num_key_value_heads",),
    "d_head": ("head_dim", "d_kv"),
    "d_ff": ("intermediate_size", "n_inner"),
    "max_positions": ("max_position_embeddings", "n_positions"),
    "encoder.n_layers": ("encoder_layers",),
    "decoder.n_layers": ("decoder_layers", "num_decoder_layers"),
    "encoder.attention.n_heads": ("encoder_attention_heads",),
    "decoder.attention.n_heads": ("decoder_attention_heads",),
    "encoder.feed_forward.d_ff": ("encoder_ffn_dim",),
    "decoder.feed_forward.d_ff": ("decoder_ffn_dim",),
}


@dataclass(frozen=True, kw_only=True)
class Architecture(Spec):
    """Every size and every choice of one model.

    `family` names the Hugging Face family whose file format the model came from and is written to; it
    changes no computation.

    >>> import lathe
    >>> small = lathe.preset("t5-small")
    >>> small.with_(d_model=384).d_model
    384
    >>> small.with_({"encoder.n_layers": 4}).decoder.n_layers
    6
    """

    d_model: int = size()
    embedding: Embedding
    encoder: Stack | None = None
    decoder: Stack | None = None
    head: Head = Head()
    tokens: Tokens = Tokens()
    dropout: Dropout = Dropout()
    initialisation: Initialisation = Initialisation()
    family: str | None = None

    def check(self) -> None:
        if self.encoder is None and self.decoder is None:
            raise RequestError("an architecture needs an encoder, a decoder or both; this one has neither")
        crosses = self.decoder is not None and self.decoder.cross_attention
        if crosses and self.encoder is None:
            raise RequestError(
                "decoder.cross_attention=true: there is no encoder to attend to; add one or set it to false"
            )
        if self.encoder is not None and self.decoder is not None and not crosses:
            raise RequestError(
                "decoder.cross_attention=false: the encoder would go unread; set it to true or drop the encoder"
            )
        if self.encoder is not None and self.encoder.cross_attention:
            raise RequestError("encoder.cross_attention=true: an encoder has nothing to attend to; set it to false")
        vocab = self.embedding.vocab_size
        ids = {"pad": self.tokens.pad, "bos": self.tokens.bos, "decoder_start": self.tokens.decoder_start}
        ids |= {"mask": self.tokens.mask, **{f"eos[{i}]": token for i, token in enumerate(self.tokens.eos)}}
        for name, token in ids.items():
            if token is not None and not 0 <= token < vocab:
                raise RequestError(f"tokens.{name}={token}: expected an id below vocab_size={vocab:,}")

    @property
    def stacks(self) -> Iterator[tuple[str, Stack]]:
        """The stacks that exist, as (name, stack), in the order in which tokens pass them."""
        return iter([(name, stack) for name in STACKS if (stack := getattr(self, name)) is not None])

    @property
    def width(self) -> int:
        """How wide the token table is: `d_embed` when factorised, else `d_model`."""
        return self.d_model if self.embedding.d_embed is None else self.embedding.d_embed

    def with_(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> Architecture:
        """A copy with other sizes.

        Args:
            changes: dotted paths to values, as `{"encoder.n_layers": 4}`.
            more: bare names. A field of the architecture itself (`d_model`) or a short name that sets every
                stack that has it (`n_layers`, `n_heads`, `d_head`, `d_ff`, `sharing`, …).

        >>> import lathe
        >>> lathe.preset("t5-small").with_({"decoder.n_layers": 2}, d_ff=1024, sharing="all").decoder.n_layers
        2

        A smaller vocabulary loses the token ids (`tokens.eos`, …) that it no longer holds; give them anew.

        Raises:
            RequestError: an unknown name, or a value that cannot be.
        """
        # Not to_dict, where a record with a written form is one word and its parts cannot be set.
        tree, given = dataclasses.asdict(self), set[str]()
        for name, value in {**(changes or {}), **more}.items():
            for path in self.paths(name):
                _assign(tree, path, dataclasses.asdict(value) if isinstance(value, Spec) else value)
                if path.startswith("tokens"):
                    given.add(path)
        _drop_lost_tokens(tree, self.tokens, given)
        return Architecture.from_dict(tree)

    def paths(self, name: str) -> list[str]:
        """The fields that `name` sets: itself if it is a path, else every existing field it is short for."""
        if name in ALIASES:
            found = [path for path in ALIASES[name] if self._has(path)]
            if not found:
                raise RequestError(f"{name}: this architecture has no {' or '.join(ALIASES[name])} to set")
            return found
        if not self._has(name):
            parent = name.rpartition(".")[0]
            owner: Any = self
            if parent:
                owner = self._at(self.paths(parent)[0])
            if owner is None:
                raise RequestError(f"{name}: this architecture has no {parent}; set {parent} as a whole first")
            if not isinstance(owner, Spec):
                raise RequestError(f"{name}: {parent} is one value and has no fields; set {parent} itself")
            ours = next((ours for ours, theirs in _CONFIG_NAMES.items() if name in theirs), None)
            if ours is not None:
                raise RequestError(f"unknown field {name!r}: here it is called {ours}")
            raise RequestError(unknown("field", name, [*owner.field_names(), *(() if parent else ALIASES)]))
        return [name]

    def short(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The same changes under short names, where one value serves every field that the name sets.

        >>> import lathe
        >>> lathe.preset("t5-small").short({"encoder.n_layers": 4, "embedding.vocab_size": 99})
        {'encoder.n_layers': 4, 'vocab_size': 99}
        """
        short: dict[str, Any] = {}
        for path, value in changes.items():
            leaf = path.rpartition(".")[2]
            known = leaf in ALIASES and path in self.paths(leaf)
            same = known and all(each in changes and changes[each] == value for each in self.paths(leaf))
            short[leaf if same else path] = value
        return short

    def _at(self, path: str) -> Any:
        value: Any = self
        for key in path.split("."):
            value = getattr(value, key)
        return value

    def _has(self, path: str) -> bool:
        value: Any = self
        for key in path.split("."):
            if not isinstance(value, Spec) or key not in value.field_names():
                return False
            value = getattr(value, key)
        return True

    def to_json(self) -> str:
        """The architecture as JSON text; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read `to_json`'s text. Text that is no JSON, or holds an unknown field, is a `RequestError`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(
                f"not JSON (line {error.lineno}, column {error.colno}): expected an architecture"
            ) from None
        except (ValueError, RecursionError):  # a number of thousands of digits; brackets without end
            raise RequestError("JSON too long or too deep to be read: expected an architecture") from None
        return cls.from_dict(values)


def _drop_lost_tokens(tree: dict[str, Any], before: Tokens, given: set[str]) -> None:
    """Forget the ids that a smaller vocabulary no longer holds; one that was given is checked like any value."""
    vocab = tree["embedding"]["vocab_size"]
    if "tokens" in given or type(vocab) is not int:
        return
    for name, held in before.to_dict().items():
        if f"tokens.{name}" in given or held is None:
            continue
        if isinstance(held, list):
            tree["tokens"][name] = tuple(token for token in held if token < vocab)
        elif held >= vocab:
            tree["tokens"][name] = None


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree[key]
        if not isinstance(tree, dict):
            raise RequestError(f"{path}: another change sets {key} as a whole; set one of the two")
    tree[leaf] = value
