"""ELECTRA (Clark et al. 2020): a small generator fills in masked tokens, a discriminator marks which were replaced.

Both are BERTs with an embedding that may be narrower than the model (§3.2; `embedding_size`); there is no lifting
matrix where the two widths are equal. The generator is `ElectraForMaskedLM`, whose head's dense layer always
has a GELU, whatever `hidden_act` says. The discriminator is `ElectraForPreTraining`: one logit a token, from a
dense layer with `hidden_act`, undropped. The classification head is a GELU layer on the first token, where
BERT has tanh; the stock class also drops the state before that layer, which Lathe does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lathe.architecture import Architecture, Embedding, Initialisation, Pooler
from lathe.families import encoder_only as common
from lathe.families.base import Config, Entry, Family, Objection, find_objections, whole
from lathe.families.encoder_only import Form, Forms, linear

_CLASSES = (
    "ElectraModel",
    "ElectraForMaskedLM",
    "ElectraForPreTraining",
    "ElectraForSequenceClassification",
    "ElectraForTokenClassification",
)

# What a config without the key means: the stock class's defaults.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def _forms(activation: str) -> Forms:
    heads = (
        Form(),
        Form(language=True),
        Form(pooler=Pooler(token="each", activation=activation), classifier=True, labels=1, drops=False),
        Form(pooler=Pooler(token="first", activation="gelu"), classifier=True),
        Form(pooler=Pooler(token="each"), classifier=True),
    )
    return dict(zip(_CLASSES, heads, strict=True))


def _forms_for(architecture: Architecture) -> Forms:
    return _forms(common.encoder_of(architecture).feed_forward.activation)


def _read(config: Config, class_name: str) -> Architecture:
    config = common.with_defaults(config, _DEFAULTS)
    form = _forms(common.read_activation(config))[class_name]
    d_model, d_embed = whole(config, "hidden_size"), whole(config, "embedding_size")
    return Architecture(
        d_model=d_model,
        embedding=Embedding(
            vocab_size=whole(config, "vocab_size"),
            d_embed=None if d_embed == d_model else d_embed,
            projection_bias=True,
            token_types=whole(config, "type_vocab_size"),
        ),
        encoder=common.read_encoder(config, whole(config, "num_hidden_layers")),
        head=common.read_head(config, form, "gelu"),
        tokens=common.read_tokens(config),
        dropout=common.read_dropout(config, form, config.get("classifier_dropout")),
        initialisation=Initialisation(std=config["initializer_range"]),
        family="electra",
    )


def _write(architecture: Architecture) -> dict[str, Any]:
    return {
        **common.write_common(architecture, "electra", _forms_for(architecture)),
        "embedding_size": architecture.width,
        "num_hidden_layers": common.encoder_of(architecture).n_layers,
        "classifier_dropout": common.classifier_dropout(architecture),
    }


def _objections(architecture: Architecture) -> list[Objection]:
    checks = (
        common.encoder_alone("ELECTRA"),
        common.learned_positions("ELECTRA"),
        common.both_ways("ELECTRA"),
        common.heads_fill_the_width("ELECTRA"),
        common.token_types("ELECTRA"),
        _lifted_only_where_narrower,
        common.known_head(_forms_for),
    )
    if architecture.encoder is not None:
        architecture = common.undropped(architecture, _forms_for(architecture))
    return find_objections(architecture, checks, _read, _write)


def _lifted_only_where_narrower(architecture: Architecture) -> Objection | None:
    if architecture.embedding.d_embed != architecture.d_model:
        return None
    return Objection(
        f"d_embed and d_model are both {architecture.d_model}, and ELECTRA then has no lifting matrix",
        {"d_embed": None},
    )


def _entries(architecture: Architecture) -> Iterator[Entry]:
    name = common.class_of(architecture.head, _forms_for(architecture))
    prefix = "" if name == "ElectraModel" else "electra."
    yield from common.embedding_entries(prefix)
    if architecture.embedding.d_embed is not None:
        yield from linear(f"{prefix}embeddings_project", "embedding.projection")
    for index in range(common.encoder_of(architecture).n_layers):
        yield from common.bert_layer_entries(prefix, index)
    yield from _head_entries(architecture, name)


def _head_entries(architecture: Architecture, name: str) -> Iterator[Entry]:
    language = architecture.head.language
    if language is not None:
        yield from linear("generator_predictions.dense", "head.language.transform")
        yield from linear("generator_predictions.LayerNorm", "head.language.norm")
        yield Entry("generator_lm_head.bias", ("head.language.output.bias",))
        if not language.tied:
            yield Entry("generator_lm_head.weight", ("head.language.output.weight",))
    elif name == "ElectraForPreTraining":
        yield from linear("discriminator_predictions.dense", "head.pooler")
        yield from linear("discriminator_predictions.dense_prediction", "head.classifier")
    elif name == "ElectraForSequenceClassification":
        yield from linear("classifier.dense", "head.pooler")
        yield from linear("classifier.out_proj", "head.classifier")
    elif name == "ElectraForTokenClassification":
        yield from linear("classifier", "head.classifier")


FAMILIES = (
    Family(
        name="electra",
        read=_read,
        write=_write,
        entries=_entries,
        objections=_objections,
        classes=_CLASSES,
        prefix="electra.",
        other_heads=(
            "generator_predictions.*",
            "generator_lm_head.*",
            "discriminator_predictions.*",
            "classifier.*",
            "qa_outputs.*",
            "sequence_summary.*",
        ),
        ignored=common.IGNORED,
        renamed=common.RENAMED,
    ),
)
