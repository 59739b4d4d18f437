"""Llama (Touvron et al. 2023, §2.2) and two families that are Llama but for a few flags: Mistral and Qwen2.

A pre-norm decoder with RMSNorm, rotary positions, a gated SiLU feed-forward and grouped key-value heads.
Mistral (Jiang et al. 2023, §2) adds a window and has no biases at all; Qwen2 (Yang et al. 2024, §2.2.1) has
biases on q, k and v alone, and a window behind a flag. Llama's may stand on every projection.

Rotary settings stand in two forms: `rope_theta` beside `rope_scaling` (transformers 4) and both within
`rope_parameters` (5). Either is read. The first is written, since both releases read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lathe.architecture import (
    Architecture,
    Attention,
    Dropout,
    Embedding,
    FeedForward,
    Initialisation,
    Norm,
    Positions,
    RotaryScaling,
    Stack,
    Tokens,
)
from lathe.errors import RequestError
from lathe.families.base import (
    Config,
    Entry,
    Family,
    Objection,
    activation_from,
    activation_to,
    expect,
    find_objections,
    given,
    ids_as_written,
    ids_of,
    label_names,
    required,
    token,
    whole,
)
from lathe.families.decoder_only import Classes, decoder_alone, read_head, write_class

PREFIX = "model."


@dataclass(frozen=True)
class _Kind:
    """Where the three families differ: the stock classes, the defaults of their configs and a few choices.

    Args:
        qkv_bias: whether q, k and v have one; None where the config's `attention_bias` and `mlp_bias` say.
        window: the config keys that set one: `sliding_window` alone, or behind `use_sliding_window`.
        divides: whether the stock config wants a width that is a multiple of the head count.
    """

    name: str
    stem: str
    vocab_size: int
    d_ff: int
    max_positions: int
    n_kv_heads: int | None
    bos: int | None
    eos: int | None
    qkv_bias: bool | None
    window: tuple[str, ...] = ()
    divides: bool = False

    @property
    def classes(self) -> Classes:
        """The stock classes."""
        return Classes(f"{self.stem}ForCausalLM", f"{self.stem}Model", f"{self.stem}ForSequenceClassification")


_KINDS = (
    _Kind(
        name="llama",
        stem="Llama",
        vocab_size=32000,
        d_ff=11008,
        max_positions=2048,
        n_kv_heads=None,
        bos=1,
        eos=2,
        qkv_bias=None,
        divides=True,
    ),
    _Kind(
        name="mistral",
        stem="Mistral",
        vocab_size=32000,
        d_ff=14336,
        max_positions=131072,
        n_kv_heads=8,
        bos=1,
        eos=2,
        qkv_bias=False,
        window=("sliding_window",),
    ),
    _Kind(
        name="qwen2",
        stem="Qwen2",
        vocab_size=151936,
        d_ff=22016,
        max_positions=32768,
        n_kv_heads=32,
        bos=None,
        eos=None,
        qkv_bias=True,
        window=("sliding_window", "use_sliding_window"),
    ),
)

# Stock classes compute this one by a kernel under one name and step by step under the other; ours is the kernel.
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def _read(kind: _Kind, config: Config, class_name: str) -> Architecture:
    vocab_size = whole(config, "vocab_size", kind.vocab_size)
    return Architecture(
        d_model=whole(config, "hidden_size", 4096),
        embedding=Embedding(vocab_size=vocab_size),
        decoder=_read_stack(kind, config),
        head=read_head(config, class_name, kind.classes, tied=False),
        tokens=Tokens(
            pad=token(config, "pad_token_id", vocab_size),
            bos=token(config, "bos_token_id", vocab_size, kind.bos),
            eos=ids_of(token(config, "eos_token_id", vocab_size, kind.eos)),
        ),
        dropout=Dropout(attention=given(config, "attention_dropout", 0.0)),
        initialisation=Initialisation(std=given(config, "initializer_range", 0.02)),
        family=kind.name,
    )


def _read_stack(kind: _Kind, config: Config) -> Stack:
    # `pretraining_tp` splits products into slices and adds them up again: the same sum, so it is not read.
    max_positions = whole(config, "max_position_embeddings", kind.max_positions)
    return Stack(
        n_layers=whole(config, "num_hidden_layers", 32),
        attention=_read_attention(kind, config),
        feed_forward=FeedForward(
            d_ff=whole(config, "intermediate_size", kind.d_ff),
            activation=activation_from(given(config, "hidden_act", "silu"), "hidden_act"),
            gated=True,
            bias=given(config, "mlp_bias", False) if kind.qkv_bias is None else False,
        ),
        norm=Norm(kind="rms", eps=given(config, "rms_norm_eps", 1e-6)),
        positions=_read_positions(config, max_positions),
        causal=True,
    )


def _read_attention(kind: _Kind, config: Config) -> Attention:
    d_model, n_heads = whole(config, "hidden_size", 4096), whole(config, "num_attention_heads", 32)
    if d_model % n_heads and (kind.divides or config.get("head_dim") is None):
        raise RequestError(
            f"hidden_size={d_model} and num_attention_heads={n_heads} in the config: "
            f"expected heads that divide the width{'' if kind.divides else ', or a head_dim'}"
        )
    # Missing, the number of key-value heads is the stock default; null, it is the number of heads.
    default = n_heads if "num_key_value_heads" in config else kind.n_kv_heads or n_heads
    n_kv_heads = whole(config, "num_key_value_heads", default)
    bias = given(config, "attention_bias", False) if kind.qkv_bias is None else kind.qkv_bias
    return Attention(
        n_heads=n_heads,
        d_head=whole(config, "head_dim", d_model // n_heads),
        n_kv_heads=None if n_kv_heads == n_heads else n_kv_heads,
        bias=bias,
        output_bias=bias if kind.qkv_bias is None else False,
        window=_read_window(kind, config),
    )


def _read_window(kind: _Kind, config: Config) -> int | None:
    """The window, which every layer has or none: Lathe's stacks repeat one block."""
    n_layers = whole(config, "num_hidden_layers", 32)
    window: int | None = None
    if kind.window and all(given(config, flag, False) for flag in kind.window[1:]):
        window = None if config.get("sliding_window", 4096) is None else whole(config, "sliding_window", 4096)
    full = whole(config, "max_window_layers", 28, least=0) if len(kind.window) > 1 else 0
    layers = ["sliding_attention" if window is not None and i >= full else "full_attention" for i in range(n_layers)]
    named = given(config, "layer_types", layers) if kind.window else layers
    if not isinstance(named, list | tuple):
        raise RequestError(f"layer_types={named!r} in the config: expected a list of one word a layer")
    layers = [str(each) for each in named]
    if window is None and "sliding_attention" in layers:
        raise RequestError("layer_types in the config has sliding_attention and no window is set; expected one of both")
    if len(set(layers)) != 1 or layers[0] not in ("sliding_attention", "full_attention"):
        ways = ", ".join(sorted(set(layers))) or "none at all"
        raise RequestError(
            f"layer_types in the config: the layers are {ways}; only full_attention for all of them, "
            "or sliding_attention for all, is supported"
        )
    return window if layers[0] == "sliding_attention" else None


def _read_positions(config: Config, max_positions: int) -> Positions:
    rope = given(config, "rope_scaling", None) or given(config, "rope_parameters", {})
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise RequestError(f"the rotary settings are {rope!r} in the config: expected one set of fields for all layers")
    for settings in (config, rope):
        expect(settings, "partial_rotary_factor", None, 1.0)
    return Positions(
        kind="rotary",
        max_positions=max_positions,
        theta=given(rope, "rope_theta", given(config, "rope_theta", 10000.0)),
        scaling=_read_scaling(rope, given(config, "original_max_position_embeddings", max_positions)),
    )


def _read_scaling(rope: Mapping[str, Any], original: int) -> RotaryScaling | None:
    kind = given(rope, "rope_type", given(rope, "type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=required(rope, "factor"))
    if kind != "llama3":
        raise RequestError(f"rope_type={kind!r} in the config: expected one of default, linear, llama3")
    return RotaryScaling(
        kind="llama3",
        factor=required(rope, "factor"),
        low_freq_factor=required(rope, "low_freq_factor"),
        high_freq_factor=required(rope, "high_freq_factor"),
        original_max_positions=whole(rope, "original_max_position_embeddings", original),
    )


def _write(kind: _Kind, architecture: Architecture) -> dict[str, Any]:
    decoder, head = architecture.decoder, architecture.head
    assert decoder is not None
    config: dict[str, Any] = {
        "architectures": [write_class(architecture, kind.classes)],
        "model_type": kind.name,
        "vocab_size": architecture.embedding.vocab_size,
        "hidden_size": architecture.d_model,
        "intermediate_size": decoder.feed_forward.d_ff,
        "num_hidden_layers": decoder.n_layers,
        "num_attention_heads": decoder.attention.n_heads,
        "num_key_value_heads": decoder.attention.kv_heads,
        "head_dim": decoder.attention.d_head,
        "hidden_act": _ACTIVATIONS.get(decoder.feed_forward.activation)
        or activation_to(decoder.feed_forward.activation),
        "max_position_embeddings": decoder.positions.max_positions,
        "rope_theta": decoder.positions.theta,
        "rope_scaling": _write_scaling(decoder.positions.scaling),
        "rms_norm_eps": decoder.norm.eps,
        "attention_dropout": architecture.dropout.attention,
        "initializer_range": architecture.initialisation.std,
        "pad_token_id": architecture.tokens.pad,
        "bos_token_id": architecture.tokens.bos,
        "eos_token_id": ids_as_written(architecture.tokens.eos),
        "tie_word_embeddings": head.language is not None and head.language.tied,
    }
    if kind.qkv_bias is None:
        config |= {"attention_bias": decoder.attention.bias, "mlp_bias": decoder.feed_forward.bias}
    if kind.window:
        config["sliding_window"] = decoder.attention.window
    if len(kind.window) > 1:
        # The window starts at layer `max_window_layers`: every layer has it.
        config |= {"use_sliding_window": decoder.attention.window is not None, "max_window_layers": 0}
    if head.classifier is not None:
        config |= label_names(head.classifier.n_labels)
    return config


def _write_scaling(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    # `type` is what transformers before 4.43 reads.
    fields: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        del fields["type"]  # it knows linear alone
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return fields


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every tensor of a Llama, Mistral or Qwen2 file."""
    decoder, head = architecture.decoder, architecture.head
    assert decoder is not None
    prefix = PREFIX if head.language is not None or head.classifier is not None else ""
    yield Entry(f"{prefix}embed_tokens.weight", ("embedding.tokens.weight",))
    for layer in range(decoder.n_layers):
        yield from _layer(decoder, f"{prefix}layers.{layer}", layer)
    yield Entry(f"{prefix}norm.weight", ("decoder.norm.weight",))
    if head.language is not None and not head.language.tied:
        yield Entry("lm_head.weight", ("head.language.output.weight",))
    if head.classifier is not None:
        yield Entry("score.weight", ("head.classifier.weight",))


def _layer(decoder: Stack, theirs: str, layer: int) -> Iterator[Entry]:
    attention, feed_forward = f"decoder.attention.{layer}", f"decoder.feed_forward.{layer}"
    yield Entry(f"{theirs}.input_layernorm.weight", (f"{attention}.norm.weight",))
    for part in "qkvo":
        biased = decoder.attention.output_bias if part == "o" else decoder.attention.bias
        yield from _linear(f"{theirs}.self_attn.{part}_proj", f"{attention}.{part}", biased)
    yield Entry(f"{theirs}.post_attention_layernorm.weight", (f"{feed_forward}.norm.weight",))
    for part in ("gate", "up", "down"):
        yield from _linear(f"{theirs}.mlp.{part}_proj", f"{feed_forward}.{part}", decoder.feed_forward.bias)


def _linear(theirs: str, ours: str, biased: bool) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}.weight",))
    if biased:
        yield Entry(f"{theirs}.bias", (f"{ours}.bias",))


def _objections(kind: _Kind, architecture: Architecture) -> list[Objection]:
    """Why this family cannot hold it. Where a sister can, becoming one is the change that loses nothing."""
    found = _own_objections(kind, architecture)
    sisters = (other for other in _KINDS if found and other is not kind and not _own_objections(other, architecture))
    sister = next(sisters, None)
    return found if sister is None else [replace(each, changes={"family": sister.name}) for each in found]


def _own_objections(kind: _Kind, architecture: Architecture) -> list[Objection]:
    checks = (decoder_alone(kind.name, "rotary"), partial(_divides, kind))
    return find_objections(architecture, checks, partial(_read, kind), partial(_write, kind))


def _divides(kind: _Kind, architecture: Architecture) -> Objection | None:
    assert architecture.decoder is not None
    attention, d_model = architecture.decoder.attention, architecture.d_model
    if not kind.divides or d_model % attention.n_heads == 0:
        return None
    return Objection(
        f"d_model is {d_model} and no multiple of n_heads, {attention.n_heads}, which a stock {kind.name} wants",
        _whole_groups(d_model, attention),
    )


def _whole_groups(d_model: int, attention: Attention) -> dict[str, int]:
    """The nearest number of heads that divides the width, in whole groups if any such number is a multiple."""
    divisors = [n for n in range(1, min(d_model, 2**14) + 1) if d_model % n == 0]
    kv_heads = attention.kv_heads
    grouped = [n for n in divisors if n % kv_heads == 0]
    if attention.n_kv_heads is None or not grouped:
        n_heads = min(divisors, key=lambda n: (abs(n - attention.n_heads), n))
        return {"n_heads": n_heads, **({} if attention.n_kv_heads is None else {"n_kv_heads": n_heads})}
    return {"n_heads": min(grouped, key=lambda n: (abs(n - attention.n_heads), n))}


def _family(kind: _Kind) -> Family:
    return Family(
        name=kind.name,
        read=partial(_read, kind),
        write=partial(_write, kind),
        entries=entries,
        objections=partial(_objections, kind),
        classes=kind.classes,
        prefix=PREFIX,
        other_heads=("lm_head.weight", "score.weight", "score.bias", "qa_outputs.*"),
        # Older files store the rotary frequencies of each layer.
        ignored=("*.rotary_emb.inv_freq",),
        # transformers 5 writes these two, which it makes of what is written here.
        stale=("layer_types", "rope_parameters"),
    )


LLAMA, MISTRAL, QWEN2 = (_family(kind) for kind in _KINDS)
FAMILIES = (LLAMA, MISTRAL, QWEN2)
