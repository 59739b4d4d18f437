"""BERT (Devlin et al. 2019): a post-norm encoder trained to fill in masked tokens and to judge sentence pairs.

The masked-LM head is a dense layer, the model's activation, a norm, then the tied token table. The pooler is a
tanh layer on the first token; `BertModel` always has it, so an encoder with nothing on top has no class that
loads without a newly initialised weight. `BertForPreTraining` puts its two-way sentence label straight on the
pooled state, undropped; `BertForSequenceClassification` drops it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lathe.architecture import Architecture, Embedding, Initialisation, Pooler
from lathe.families import encoder_only as common
from lathe.families.base import Config, Entry, Family, Objection, find_objections, whole
from lathe.families.encoder_only import Form, linear

_POOLER = Pooler(token="first", activation="tanh")
_FORMS = {
    "BertModel": Form(pooler=_POOLER),
    "BertForMaskedLM": Form(language=True),
    "BertForPreTraining": Form(language=True, pooler=_POOLER, classifier=True, labels=2, drops=False),
    "BertForSequenceClassification": Form(pooler=_POOLER, classifier=True),
    "BertForTokenClassification": Form(pooler=Pooler(token="each"), classifier=True),
}

# What a config without the key means: the stock class's defaults.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
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


def _read(config: Config, class_name: str) -> Architecture:
    config = common.with_defaults(config, _DEFAULTS)
    form = _FORMS[class_name]
    return Architecture(
        d_model=whole(config, "hidden_size"),
        embedding=Embedding(vocab_size=whole(config, "vocab_size"), token_types=whole(config, "type_vocab_size")),
        encoder=common.read_encoder(config, whole(config, "num_hidden_layers")),
        head=common.read_head(config, form, common.read_activation(config)),
        tokens=common.read_tokens(config),
        dropout=common.read_dropout(config, form, config.get("classifier_dropout")),
        initialisation=Initialisation(std=config["initializer_range"]),
        family="bert",
    )


def _write(architecture: Architecture) -> dict[str, Any]:
    return {
        **common.write_common(architecture, "bert", _FORMS),
        "num_hidden_layers": common.encoder_of(architecture).n_layers,
        "classifier_dropout": common.classifier_dropout(architecture),
    }


def _objections(architecture: Architecture) -> list[Objection]:
    checks = (
        common.encoder_alone("BERT"),
        common.learned_positions("BERT"),
        common.both_ways("BERT"),
        common.heads_fill_the_width("BERT"),
        common.token_types("BERT"),
        _unfactorised,
        common.known_head(lambda _: _FORMS),
    )
    return find_objections(common.undropped(architecture, _FORMS), checks, _read, _write)


def _unfactorised(architecture: Architecture) -> Objection | None:
    if architecture.embedding.d_embed is None:
        return None
    return Objection(
        f"its embedding is factorised (d_embed is {architecture.embedding.d_embed}), which ELECTRA and ALBERT "
        "hold and BERT does not",
        {"d_embed": None},
    )


def _entries(architecture: Architecture) -> Iterator[Entry]:
    name = common.class_of(architecture.head, _FORMS)
    prefix = "" if name == "BertModel" else "bert."
    yield from common.embedding_entries(prefix)
    for index in range(common.encoder_of(architecture).n_layers):
        yield from common.bert_layer_entries(prefix, index)
    head = architecture.head
    if head.language is not None:
        yield from linear("cls.predictions.transform.dense", "head.language.transform")
        yield from linear("cls.predictions.transform.LayerNorm", "head.language.norm")
        yield from common.output_entries("cls.predictions", head.language)
    if head.pooler is not None and head.pooler.activation is not None:
        yield from linear(f"{prefix}pooler.dense", "head.pooler")
    if head.classifier is not None:
        yield from linear("classifier" if head.language is None else "cls.seq_relationship", "head.classifier")


FAMILIES = (
    Family(
        name="bert",
        read=_read,
        write=_write,
        entries=_entries,
        objections=_objections,
        classes=tuple(_FORMS),
        prefix="bert.",
        other_heads=("pooler.*", "bert.pooler.*", "cls.*", "classifier.*", "qa_outputs.*"),
        ignored=common.IGNORED,
        renamed=common.RENAMED,
    ),
)
