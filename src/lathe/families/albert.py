"""ALBERT (Lan et al. 2020): BERT with a factorised embedding (§3.1) and layers that share their weights.

The embedding is always lifted by a matrix, even where it is as wide as the model. The stock classes run
`num_hidden_layers · inner_group_num` layers: `num_hidden_groups` runs of equal length, each with
`inner_group_num` sets of weights that it goes through in turn. So they hold whole layers that are shared in
groups, in cycles, or not at all, and none that share their attention or their feed-forward alone. (Transformers
4 opens but cannot run a cycle that is longer than a group's number of runs; 5 can.)

`AlbertForPreTraining` judges the order of two sentences (§3.1) beside the masked tokens. ALBERT's stock layers
drop what the attention adds and not what the feed-forward adds; Lathe drops both alike, in training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lathe.architecture import Architecture, Embedding, Initialisation, Pooler, Sharing, Stack
from lathe.errors import RequestError
from lathe.families import encoder_only as common
from lathe.families.base import Config, Entry, Family, Objection, find_objections, whole
from lathe.families.encoder_only import Form, linear

_POOLER = Pooler(token="first", activation="tanh")
_FORMS = {
    "AlbertModel": Form(pooler=_POOLER),
    "AlbertForMaskedLM": Form(language=True),
    "AlbertForPreTraining": Form(language=True, pooler=_POOLER, classifier=True),
    "AlbertForSequenceClassification": Form(pooler=_POOLER, classifier=True),
    "AlbertForTokenClassification": Form(pooler=Pooler(token="each"), classifier=True),
}

# What a config without the key means: the stock class's defaults.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_hidden_layers": 12,
    "num_hidden_groups": 1,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "inner_group_num": 1,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "classifier_dropout_prob": 0.1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
_TOKENS = {"bos_token_id": 2, "eos_token_id": 3}


def _read(config: Config, class_name: str) -> Architecture:
    config = common.with_defaults(config, _DEFAULTS)
    vocab_size = whole(config, "vocab_size")
    config = {**{key: id_ for key, id_ in _TOKENS.items() if id_ < vocab_size}, **config}
    form = _FORMS[class_name]
    n_layers, sharing = _read_layers(config)
    return Architecture(
        d_model=whole(config, "hidden_size"),
        embedding=Embedding(
            vocab_size=vocab_size,
            d_embed=whole(config, "embedding_size"),
            projection_bias=True,
            token_types=whole(config, "type_vocab_size"),
        ),
        encoder=common.read_encoder(config, n_layers, sharing),
        head=common.read_head(config, form, common.read_activation(config)),
        tokens=common.read_tokens(config),
        dropout=common.read_dropout(config, form, config["classifier_dropout_prob"]),
        initialisation=Initialisation(std=config["initializer_range"]),
        family="albert",
    )


def _read_layers(config: Config) -> tuple[int, Sharing]:
    runs, groups = whole(config, "num_hidden_layers"), whole(config, "num_hidden_groups")
    cycle = whole(config, "inner_group_num")
    if runs % groups:
        raise RequestError(
            f"num_hidden_groups={groups} in the config: expected a divisor of num_hidden_layers={runs}, "
            "so that every group has as many layers"
        )
    if cycle == 1 and groups == runs > 1:
        return runs, Sharing()
    # One layer is written as shared by all, as ALBERT's are, so that a deeper copy stays an ALBERT.
    return runs * cycle, Sharing(attention=True, feed_forward=True, groups=groups, cycle=cycle)


def _write_layers(stack: Stack) -> dict[str, int]:
    sharing, n = stack.sharing, stack.n_layers
    whole_layers = sharing.attention and sharing.feed_forward
    groups, cycle = (sharing.groups, sharing.cycle) if whole_layers else (n, 1)
    return {"num_hidden_layers": n // cycle, "num_hidden_groups": groups, "inner_group_num": cycle}


def _write(architecture: Architecture) -> dict[str, Any]:
    return {
        **common.write_common(architecture, "albert", _FORMS),
        **_write_layers(common.encoder_of(architecture)),
        "embedding_size": architecture.width,
        "classifier_dropout_prob": architecture.dropout.classifier,
    }


def _objections(architecture: Architecture) -> list[Objection]:
    checks = (
        common.encoder_alone("ALBERT"),
        common.learned_positions("ALBERT"),
        common.both_ways("ALBERT"),
        common.heads_fill_the_width("ALBERT"),
        common.token_types("ALBERT"),
        _factorised,
        _whole_layers_shared,
        common.known_head(lambda _: _FORMS),
    )
    return find_objections(architecture, checks, _read, _write)


def _factorised(architecture: Architecture) -> Objection | None:
    if architecture.embedding.d_embed is not None:
        return None
    return Objection(
        "its embedding is not factorised (d_embed is none), and ALBERT always lifts it by a matrix",
        {"d_embed": architecture.d_model, "embedding.projection_bias": True},
    )


def _whole_layers_shared(architecture: Architecture) -> Objection | None:
    stack = common.encoder_of(architecture)
    halves = stack.sharing.attention, stack.sharing.feed_forward
    # A half that is "shared" in as many sets as there are layers shares nothing.
    if halves in ((True, True), (False, False)) or stack.n_attentions == stack.n_feed_forwards == stack.n_layers:
        return None
    half = "attention" if stack.sharing.attention else "feed-forward"
    return Objection(
        f"its layers share their {half} alone, and ALBERT shares whole layers; "
        "sharing=none stores each layer's own copy",
        {"sharing": "none"},
    )


def _entries(architecture: Architecture) -> Iterator[Entry]:
    name = common.class_of(architecture.head, _FORMS)
    prefix = "" if name == "AlbertModel" else "albert."
    yield from common.embedding_entries(prefix)
    yield from linear(f"{prefix}encoder.embedding_hidden_mapping_in", "embedding.projection")
    layers = _write_layers(common.encoder_of(architecture))
    cycle = layers["inner_group_num"]
    for index in range(layers["num_hidden_groups"] * cycle):
        yield from _layer_entries(f"{prefix}encoder.albert_layer_groups.{index // cycle}", index % cycle, index)
    head = architecture.head
    if head.language is not None:
        yield from linear("predictions.dense", "head.language.transform")
        yield from linear("predictions.LayerNorm", "head.language.norm")
        yield from common.output_entries("predictions", head.language)
    if head.pooler is not None and head.pooler.activation is not None:
        yield from linear(f"{prefix}pooler", "head.pooler")
    if head.classifier is not None:
        yield from linear("classifier" if head.language is None else "sop_classifier.classifier", "head.classifier")


def _layer_entries(group: str, inner: int, index: int) -> Iterator[Entry]:
    at, attention, mlp = f"{group}.albert_layers.{inner}", f"encoder.attention.{index}", f"encoder.feed_forward.{index}"
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("dense", "o"), ("LayerNorm", "norm")):
        yield from linear(f"{at}.attention.{theirs}", f"{attention}.{ours}")
    yield from linear(f"{at}.ffn", f"{mlp}.up")
    yield from linear(f"{at}.ffn_output", f"{mlp}.down")
    yield from linear(f"{at}.full_layer_layer_norm", f"{mlp}.norm")


FAMILIES = (
    Family(
        name="albert",
        read=_read,
        write=_write,
        entries=_entries,
        objections=_objections,
        classes=tuple(_FORMS),
        prefix="albert.",
        other_heads=(
            "pooler.*",
            "albert.pooler.*",
            "predictions.*",
            "sop_classifier.*",
            "classifier.*",
            "qa_outputs.*",
        ),
        ignored=common.IGNORED,
        renamed=common.RENAMED,
    ),
)
