"""T5 (Raffel et al. 2020), T5 1.1 and FLAN-T5 (Shazeer 2020's gated feed-forward), and mT5 (Xue et al. 2021).

Pre-norm encoder and decoder with RMSNorm, no biases, scores that are not scaled, and one relative bias per
stack, which lives in the file with the first layer's attention. `d_kv` is free of `d_model`.

The head. T5 1.0 ties it to the token table and multiplies the hidden states by d_model^-½ first; 1.1, FLAN and
mT5 have a head of their own and do not. Transformers 4 knows one key for both facts, `tie_word_embeddings`.
Transformers 5 takes the scale from `scale_decoder_outputs` where that key stands, from
`tie_word_embeddings` otherwise, then ties whatever the file does not store apart; its mT5 never scales. Both
keys are written here, so tied and scaled, or neither, reads alike in both releases. The two mixed forms,
and a tied mT5, are read rightly by transformers 5 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
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
from lathe.errors import RequestError
from lathe.families.base import (
    Config,
    Entry,
    Family,
    Objection,
    activation_from,
    activation_to,
    expect,
    ids_as_written,
    ids_of,
    label_names,
    n_labels,
    round_trip_objections,
    token,
    whole,
)

# What a config without the key means: the stock classes' defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    "mt5": {
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
}


def _read(config: Config, class_name: str, *, model_type: str) -> Architecture:
    # A null means the default, except that a model may have no token of a kind.
    kept = {key: value for key, value in config.items() if value is not None or key.endswith("_token_id")}
    config = _DEFAULTS[model_type] | kept
    for key in ("is_decoder", "tie_encoder_decoder"):
        expect(config, key, False)
    kind = class_name.removeprefix("MT5" if model_type == "mt5" else "T5")
    encoder = _stack(config, whole(config, "num_layers"))
    decoder = None
    if kind not in ("EncoderModel", "ForTokenClassification"):
        depth = whole(config, "num_decoder_layers", encoder.n_layers)
        decoder = _stack(config, depth, causal=True, cross_attention=True)
    vocab_size = whole(config, "vocab_size")
    pad = token(config, "pad_token_id", vocab_size, 0)
    rate = config.get("dropout_rate", 0.1)
    return Architecture(
        d_model=whole(config, "d_model", 512),
        embedding=Embedding(vocab_size=vocab_size),
        encoder=encoder,
        decoder=decoder,
        head=_head(config, kind, model_type),
        tokens=Tokens(
            pad=pad,
            bos=token(config, "bos_token_id", vocab_size),
            eos=ids_of(token(config, "eos_token_id", vocab_size, 1)),
            # Stock classes start the decoder with the pad where nothing else is named.
            decoder_start=pad if (start := token(config, "decoder_start_token_id", vocab_size)) is None else start,
        ),
        dropout=Dropout(
            hidden=rate,
            attention=rate,
            activation=rate,
            embedding=rate,
            output=rate,
            classifier=config.get("classifier_dropout", 0.0),
        ),
        initialisation=Initialisation(kind="fan_in"),
        family=model_type,
    )


def _stack(config: Config, depth: int, *, causal: bool = False, cross_attention: bool = False) -> Stack:
    gated, activation = _feed_forward_kind(config)
    return Stack(
        n_layers=depth,
        attention=Attention(
            n_heads=whole(config, "num_heads"),
            d_head=whole(config, "d_kv", 64),
            bias=False,
            output_bias=False,
            scaled=False,
        ),
        feed_forward=FeedForward(d_ff=whole(config, "d_ff"), activation=activation, gated=gated, bias=False),
        norm=Norm(kind="rms", eps=config.get("layer_norm_epsilon", 1e-6)),
        positions=Positions(
            kind="relative",
            n_buckets=whole(config, "relative_attention_num_buckets", 32),
            max_distance=whole(config, "relative_attention_max_distance", 128),
        ),
        causal=causal,
        cross_attention=cross_attention,
    )


def _feed_forward_kind(config: Config) -> tuple[bool, str]:
    """Whether the feed-forward is gated, and its activation, from `gated-gelu`, `relu`, `gated-silu`, …"""
    written = config["feed_forward_proj"]
    parts = written.split("-") if isinstance(written, str) else []
    if len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != "gated"):
        raise RequestError(
            f"feed_forward_proj={written!r} in the config: expected an activation, or gated- and an activation"
        )
    # The one short form that stands for another function than its name says.
    named = "gelu_new" if written == "gated-gelu" else parts[-1]
    # Saved configs also carry what the stock class made of it, and that is what it then uses.
    gated = config.get("is_gated_act", len(parts) == 2)
    return gated, activation_from(config.get("dense_act_fn", named), "feed_forward_proj")


def _head(config: Config, kind: str, model_type: str) -> Head:
    if kind == "ForConditionalGeneration":
        tied = config.get("tie_word_embeddings", True)
        scaled = config.get("scale_decoder_outputs", tied) if model_type == "t5" else False
        return Head(language=LanguageHead(tied=tied, scaled=scaled))
    if kind == "ForSequenceClassification":
        return Head(pooler=Pooler(token="eos", activation="tanh"), classifier=Classifier(n_labels=n_labels(config)))
    if kind == "ForTokenClassification":
        return Head(pooler=Pooler(token="each"), classifier=Classifier(n_labels=n_labels(config)))
    return Head()


def _class_of(architecture: Architecture) -> str:
    """The stock class, without its T5 or MT5, that comes closest to the architecture."""
    if architecture.decoder is None:
        return "EncoderModel" if architecture.head.classifier is None else "ForTokenClassification"
    if architecture.head.language is not None:
        return "ForConditionalGeneration"
    return "Model" if architecture.head.classifier is None else "ForSequenceClassification"


def _write(architecture: Architecture, *, model_type: str) -> dict[str, Any]:
    encoder, decoder, tokens = architecture.encoder, architecture.decoder, architecture.tokens
    assert encoder is not None, "objections let no decoder through alone"
    activation = activation_to(encoder.feed_forward.activation)
    # "gated-gelu" means gelu_new, so the exact gelu goes by its longer name.
    short = {"gelu": "gelu_python", "gelu_new": "gelu"}.get(activation, activation)
    kind = _class_of(architecture)
    config: dict[str, Any] = {
        "architectures": [("MT5" if model_type == "mt5" else "T5") + kind],
        "model_type": model_type,
        "vocab_size": architecture.embedding.vocab_size,
        "d_model": architecture.d_model,
        "d_kv": encoder.attention.d_head,
        "d_ff": encoder.feed_forward.d_ff,
        "num_layers": encoder.n_layers,
        "num_decoder_layers": encoder.n_layers if decoder is None else decoder.n_layers,
        "num_heads": encoder.attention.n_heads,
        "relative_attention_num_buckets": encoder.positions.n_buckets,
        "relative_attention_max_distance": encoder.positions.max_distance,
        "layer_norm_epsilon": encoder.norm.eps,
        "feed_forward_proj": f"gated-{short}" if encoder.feed_forward.gated else activation,
        "dense_act_fn": activation,
        "is_gated_act": encoder.feed_forward.gated,
        "dropout_rate": architecture.dropout.hidden,
        "classifier_dropout": architecture.dropout.classifier,
        "initializer_factor": 1.0,
        "is_encoder_decoder": decoder is not None,
        "use_cache": decoder is not None,
        "pad_token_id": tokens.pad,
        "eos_token_id": ids_as_written(tokens.eos),
        "decoder_start_token_id": tokens.decoder_start,
    }
    if tokens.bos is not None:
        config["bos_token_id"] = tokens.bos
    if architecture.head.language is not None:
        config["tie_word_embeddings"] = architecture.head.language.tied
        if model_type == "t5":
            config["scale_decoder_outputs"] = architecture.head.language.scaled
    if architecture.head.classifier is not None:
        config |= label_names(architecture.head.classifier.n_labels)
    return config


def _objections(
    architecture: Architecture,
    *,
    read: Callable[[Config, str], Architecture],
    write: Callable[[Architecture], dict[str, Any]],
) -> list[Objection]:
    if architecture.encoder is None:
        return [Objection("there is no encoder, and T5's decoder reads one", {})]
    return round_trip_objections(architecture, read, write)


def _entries(architecture: Architecture) -> Iterator[Entry]:
    body = "transformer." if architecture.head.classifier is not None else ""
    stacks = dict(architecture.stacks)
    copies = tuple(f"{body}{name}.embed_tokens.weight" for name in stacks)
    yield Entry(f"{body}shared.weight", ("embedding.tokens.weight",), copies=copies)
    for name, stack in stacks.items():
        yield from _stack_entries(f"{body}{name}", name, stack)
    head = architecture.head
    if head.language is not None and not head.language.tied:
        yield Entry("lm_head.weight", ("head.language.output.weight",))
    if head.classifier is not None:
        each = head.pooler is not None and head.pooler.token == "each"
        for part in ("weight", "bias"):
            if not each:
                yield Entry(f"classification_head.dense.{part}", (f"head.pooler.{part}",))
            name = "classifier" if each else "classification_head.out_proj"
            yield Entry(f"{name}.{part}", (f"head.classifier.{part}",))


def _stack_entries(theirs: str, ours: str, stack: Stack) -> Iterator[Entry]:
    yield Entry(
        f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{ours}.relative_bias.weight",)
    )
    gated = stack.feed_forward.gated
    for i in range(stack.n_layers):
        sublayers = [("SelfAttention", "attention")]
        if stack.cross_attention:
            sublayers.append(("EncDecAttention", "cross_attention"))
        for number, (their_name, our_name) in enumerate(sublayers):
            layer, attention = f"{theirs}.block.{i}.layer.{number}", f"{ours}.{our_name}.{i}"
            for letter in "qkvo":
                yield Entry(f"{layer}.{their_name}.{letter}.weight", (f"{attention}.{letter}.weight",))
            yield Entry(f"{layer}.layer_norm.weight", (f"{attention}.norm.weight",))
        layer, feed_forward = f"{theirs}.block.{i}.layer.{len(sublayers)}", f"{ours}.feed_forward.{i}"
        up = (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),)
        for their_name, our_name in (*up, ("wo", "down")):
            yield Entry(f"{layer}.DenseReluDense.{their_name}.weight", (f"{feed_forward}.{our_name}.weight",))
        yield Entry(f"{layer}.layer_norm.weight", (f"{feed_forward}.norm.weight",))
    yield Entry(f"{theirs}.final_layer_norm.weight", (f"{ours}.norm.weight",))


def _family(model_type: str, class_prefix: str) -> Family:
    read = partial(_read, model_type=model_type)
    write = partial(_write, model_type=model_type)
    kinds = ("ForConditionalGeneration", "Model", "EncoderModel", "ForSequenceClassification", "ForTokenClassification")
    return Family(
        name=model_type,
        read=read,
        write=write,
        entries=_entries,
        objections=partial(_objections, read=read, write=write),
        classes=tuple(class_prefix + kind for kind in kinds),
        prefix="transformer.",
        other_heads=("lm_head.*", "classification_head.*", "classifier.*", "qa_outputs.*"),
        # A bias of cross-attention that files of the first release store and nothing reads.
        ignored=("*EncDecAttention.relative_attention_bias.weight",),
        opens_packed=False,
        stale=("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim"),
    )


T5 = _family("t5", "T5")
MT5 = _family("mt5", "MT5")
FAMILIES = (T5, MT5)
