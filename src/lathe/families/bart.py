"""BART (Lewis et al. 2020) and mBART (Liu et al. 2020): encoder-decoders trained to undo noise.

Learned positions whose table starts two rows early, LayerNorm with an eps that no config can change, biases
everywhere, and a norm on the embeddings. BART norms after each sublayer and ends there. mBART norms before
and closes each stack with one more norm. Both add a stored, untrained bias to the logits.

mBART starts its decoder with the language code that closes the labels, so its architecture has no
`decoder_start`; the token that generation starts with travels in the generation settings.

Stock classes keep a token table for each stack and tie all of them to one, or none: `tie_word_embeddings`
says which. Lathe has one table for both stacks. A model with a head of its own is therefore written with
three equal copies of the table, and read only where the copies are equal.
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
    Check,
    Config,
    Entry,
    Family,
    Objection,
    activation_from,
    activation_to,
    expect,
    find_objections,
    heads_that_fit,
    ids_as_written,
    ids_of,
    label_names,
    n_labels,
    token,
    whole,
)

_EPS = 1e-5  # of every LayerNorm; torch's default, and no key of the config
_OFFSET = 2  # rows of the position table that stand before position 0
_CLASSES = {"bart": "Bart", "mbart": "MBart"}
_LABELS = {"bart": 3, "mbart": 2}  # how many a classifier has whose config names none


def _read(config: Config, class_name: str, *, model_type: str) -> Architecture:
    # A null means the default, except that a model may have no token of a kind.
    config = {key: value for key, value in config.items() if value is not None or key.endswith("_token_id")}
    for key in ("is_decoder", "tie_encoder_decoder"):
        expect(config, key, False)
    for key in ("encoder_layerdrop", "decoder_layerdrop"):
        expect(config, key, 0.0)
    d_model, vocab_size = whole(config, "d_model", 1024), whole(config, "vocab_size", 50265)
    dropout = config.get("dropout", 0.1)
    start = token(config, "decoder_start_token_id", vocab_size, 2) if model_type == "bart" else None
    return Architecture(
        d_model=d_model,
        embedding=Embedding(vocab_size=vocab_size, scaled=config.get("scale_embedding", False)),
        encoder=_stack(config, "encoder", d_model, model_type),
        decoder=_stack(config, "decoder", d_model, model_type),
        head=_head(config, class_name.removeprefix(_CLASSES[model_type]), model_type),
        tokens=Tokens(
            pad=token(config, "pad_token_id", vocab_size, 1),
            bos=token(config, "bos_token_id", vocab_size, 0),
            eos=ids_of(token(config, "eos_token_id", vocab_size, 2)),
            decoder_start=start,
        ),
        dropout=Dropout(
            hidden=dropout,
            embedding=dropout,
            attention=config.get("attention_dropout", 0.0),
            activation=config.get("activation_dropout", 0.0),
            classifier=config.get("classifier_dropout", 0.0),
        ),
        initialisation=Initialisation(std=config.get("init_std", 0.02)),
        family=model_type,
    )


def _stack(config: Config, name: str, d_model: int, model_type: str) -> Stack:
    n_heads = whole(config, f"{name}_attention_heads", 16)
    if d_model % n_heads:
        raise RequestError(
            f"{name}_attention_heads={n_heads} in the config: expected a divisor of d_model={d_model}, "
            "since a head is d_model over heads wide"
        )
    decodes, pre = name == "decoder", model_type == "mbart"
    return Stack(
        n_layers=whole(config, f"{name}_layers", 12),
        attention=Attention(n_heads=n_heads, d_head=d_model // n_heads),
        feed_forward=FeedForward(
            d_ff=whole(config, f"{name}_ffn_dim", 4096),
            activation=activation_from(config.get("activation_function", "gelu"), "activation_function"),
        ),
        norm=Norm(kind="layer", eps=_EPS),
        norm_position="pre" if pre else "post",
        input_norm=True,
        final_norm=pre,
        positions=Positions(
            kind="learned", max_positions=whole(config, "max_position_embeddings", 1024), offset=_OFFSET
        ),
        causal=decodes,
        cross_attention=decodes,
    )


def _head(config: Config, kind: str, model_type: str) -> Head:
    if kind == "ForConditionalGeneration":
        return Head(language=LanguageHead(tied=config.get("tie_word_embeddings", True), offset=True))
    if kind == "ForSequenceClassification":
        labels = n_labels({"num_labels": _LABELS[model_type], **config})
        return Head(pooler=Pooler(token="eos", activation="tanh"), classifier=Classifier(n_labels=labels))
    return Head()


def _class_of(architecture: Architecture) -> str:
    """The stock class, without its Bart or MBart, that comes closest to the architecture."""
    if architecture.head.language is not None:
        return "ForConditionalGeneration"
    return "Model" if architecture.head.classifier is None else "ForSequenceClassification"


def _write(architecture: Architecture, *, model_type: str) -> dict[str, Any]:
    encoder, decoder, tokens = architecture.encoder, architecture.decoder, architecture.tokens
    assert encoder is not None
    assert decoder is not None
    language, classifier = architecture.head.language, architecture.head.classifier
    config: dict[str, Any] = {
        "architectures": [_CLASSES[model_type] + _class_of(architecture)],
        "model_type": model_type,
        "vocab_size": architecture.embedding.vocab_size,
        "d_model": architecture.d_model,
        "max_position_embeddings": encoder.positions.max_positions or 1024,
        "activation_function": activation_to(encoder.feed_forward.activation),
        "dropout": architecture.dropout.hidden,
        "attention_dropout": architecture.dropout.attention,
        "activation_dropout": architecture.dropout.activation,
        "classifier_dropout": architecture.dropout.classifier,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": architecture.initialisation.std,
        "scale_embedding": architecture.embedding.scaled,
        "is_encoder_decoder": True,
        "tie_word_embeddings": language is None or language.tied,
        # A second name of encoder_layers, which stock configs also carry and let win.
        "num_hidden_layers": encoder.n_layers,
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": ids_as_written(tokens.eos),
    }
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        config[f"{name}_layers"] = stack.n_layers
        config[f"{name}_attention_heads"] = stack.attention.n_heads
        config[f"{name}_ffn_dim"] = stack.feed_forward.d_ff
    if model_type == "bart":
        config["decoder_start_token_id"] = tokens.decoder_start
    if tokens.eos != (2,):
        # Stock generation ends a text that grows too long with this token, 2 unless the config says otherwise.
        config["forced_eos_token_id"] = tokens.eos[0] if tokens.eos else None
    if classifier is not None:
        config |= label_names(classifier.n_labels)
    return config


def _both_stacks(architecture: Architecture) -> Objection | None:
    if architecture.encoder is not None and architecture.decoder is not None:
        return None
    return Objection("it has no encoder or no decoder, and a bart is both", {})


def _heads_fit(name: str) -> Check:
    """The check that a stack's heads are together as wide as the model."""

    def check(architecture: Architecture) -> Objection | None:
        attention, d_model = dict(architecture.stacks)[name].attention, architecture.d_model
        if attention.d_q == d_model:
            return None
        changes: dict[str, Any] = heads_that_fit(d_model, attention.n_heads, attention.d_head)
        if attention.n_kv_heads is not None:
            changes["n_kv_heads"] = None  # the new heads may not divide into the old groups
        return Objection(
            f"{name}.n_heads · d_head is {attention.d_q} and d_model is {d_model}, and a bart has them equal",
            {f"{name}.attention.{field}": value for field, value in changes.items()},
        )

    return check


def _objections(
    architecture: Architecture,
    *,
    read: Callable[[Config, str], Architecture],
    write: Callable[[Architecture], dict[str, Any]],
) -> list[Objection]:
    checks = (_both_stacks, _heads_fit("encoder"), _heads_fit("decoder"))
    return find_objections(architecture, checks, read, write)


def _entries(architecture: Architecture) -> Iterator[Entry]:
    head = architecture.head
    body = "" if head.language is None and head.classifier is None else "model."
    tables = tuple(f"{body}{name}.embed_tokens.weight" for name, _ in architecture.stacks)
    untied = head.language is not None and not head.language.tied
    yield Entry(
        f"{body}shared.weight",
        ("embedding.tokens.weight",),
        again=tables if untied else (),
        copies=() if untied else tables,
    )
    for name, stack in architecture.stacks:
        yield from _stack_entries(f"{body}{name}", name, stack)
    if head.language is not None:
        yield Entry("final_logits_bias", ("head.language.offset",), row=True)
    if untied:
        yield Entry("lm_head.weight", ("head.language.output.weight",))
    if head.classifier is not None:
        yield from _both("classification_head.dense", "head.pooler")
        yield from _both("classification_head.out_proj", "head.classifier")


def _stack_entries(theirs: str, ours: str, stack: Stack) -> Iterator[Entry]:
    yield Entry(f"{theirs}.embed_positions.weight", (f"{ours}.input.positions.weight",))
    yield from _both(f"{theirs}.layernorm_embedding", f"{ours}.input.norm")
    attentions = [("self_attn", "attention")]
    if stack.cross_attention:
        attentions.append(("encoder_attn", "cross_attention"))
    for i in range(stack.n_layers):
        layer = f"{theirs}.layers.{i}"
        for their_name, our_name in attentions:
            for their_part, our_part in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
                yield from _both(f"{layer}.{their_name}.{their_part}", f"{ours}.{our_name}.{i}.{our_part}")
            yield from _both(f"{layer}.{their_name}_layer_norm", f"{ours}.{our_name}.{i}.norm")
        for their_part, our_part in (("fc1", "up"), ("fc2", "down"), ("final_layer_norm", "norm")):
            yield from _both(f"{layer}.{their_part}", f"{ours}.feed_forward.{i}.{our_part}")
    if stack.final_norm:
        yield from _both(f"{theirs}.layer_norm", f"{ours}.norm")


def _both(theirs: str, ours: str) -> Iterator[Entry]:
    """A weight and its bias."""
    for part in ("weight", "bias"):
        yield Entry(f"{theirs}.{part}", (f"{ours}.{part}",))


def _family(model_type: str) -> Family:
    read = partial(_read, model_type=model_type)
    write = partial(_write, model_type=model_type)
    kinds = ("ForConditionalGeneration", "Model", "ForSequenceClassification")
    return Family(
        name=model_type,
        read=read,
        write=write,
        entries=_entries,
        objections=partial(_objections, read=read, write=write),
        classes=tuple(_CLASSES[model_type] + kind for kind in kinds),
        prefix="model.",
        other_heads=("lm_head.*", "final_logits_bias", "classification_head.*", "qa_outputs.*"),
        ignored=("*encoder.version", "*decoder.version"),
        stale=("hidden_size", "num_attention_heads", "num_hidden_layers"),
    )


BART = _family("bart")
MBART = _family("mbart")
FAMILIES = (BART, MBART)
