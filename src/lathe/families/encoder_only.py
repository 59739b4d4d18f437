"""What BERT, ELECTRA and ALBERT have in common: the body, the heads and the names of both.

Post-norm encoders with learned positions and token types (Devlin et al. 2019, §3). ELECTRA and ALBERT put a
narrower embedding in front, with the positions, the token types and the first norm at its width. The families
differ in that embedding, in which layers share weights, and in the dense layers of their heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lathe.architecture import (
    Architecture,
    Attention,
    Classifier,
    Dropout,
    FeedForward,
    Head,
    LanguageHead,
    Norm,
    Pooler,
    Positions,
    Sharing,
    Stack,
    Tokens,
)
from lathe.errors import RequestError
from lathe.families.base import (
    Check,
    Config,
    Entry,
    Objection,
    activation_from,
    activation_to,
    expect,
    heads_that_fit,
    ids_as_written,
    ids_of,
    label_names,
    n_labels,
    token,
    whole,
)

Write = Callable[[Architecture], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """The head of one stock class.

    Args:
        language: whether it has a masked-LM head.
        pooler: the state that it pools, if any.
        classifier: whether labels are read off that state.
        labels: how many, where the class does not let the config say.
        drops: whether the pooled state is dropped out in training.
    """

    language: bool = False
    pooler: Pooler | None = None
    classifier: bool = False
    labels: int | None = None
    drops: bool = True


Forms = Mapping[str, Form]

# Older names, as the first releases stored them, and buffers that newer ones no longer store.
RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
IGNORED = ("*embeddings.position_ids", "*embeddings.token_type_ids")


# --- config.json to an architecture


def with_defaults(config: Config, defaults: Config) -> dict[str, Any]:
    """The config with the stock class's defaults for missing keys.

    A null is a missing key, except where null is a value: token ids and the classifier's dropout.

    Raises:
        RequestError: a setting that makes the stock class something else than this encoder.
    """
    for key in ("is_decoder", "add_cross_attention"):
        expect(config, key, False, None)
    expect(config, "position_embedding_type", "absolute", None)
    expect(config, "pruned_heads", {}, None)
    given = {key: value for key, value in config.items() if value is not None or key.endswith("_token_id")}
    return {**defaults, **given}


def read_encoder(config: Config, n_layers: int, sharing: Sharing | None = None) -> Stack:
    """The encoder of a config that has every key."""
    d_model, n_heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    if d_model % n_heads:
        raise RequestError(
            f"hidden_size={d_model} in the config: expected a multiple of num_attention_heads={n_heads}, "
            "so that every head has the same width"
        )
    return Stack(
        n_layers=n_layers,
        attention=Attention(n_heads=n_heads, d_head=d_model // n_heads),
        feed_forward=FeedForward(d_ff=whole(config, "intermediate_size"), activation=read_activation(config)),
        norm=Norm(kind="layer", eps=config["layer_norm_eps"]),
        norm_position="post",
        input_norm=True,
        final_norm=False,
        positions=Positions(kind="learned", max_positions=whole(config, "max_position_embeddings")),
        sharing=sharing or Sharing(),
    )


def read_activation(config: Config) -> str:
    """Lathe's name of the config's activation."""
    return activation_from(config["hidden_act"], "hidden_act")


def read_tokens(config: Config) -> Tokens:
    """The token ids of a config; stock defaults where it names none and the vocabulary holds them."""
    vocab_size = whole(config, "vocab_size")
    ids = {key: token(config, key, vocab_size) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return Tokens(pad=ids["pad_token_id"], bos=ids["bos_token_id"], eos=ids_of(ids["eos_token_id"]))


def read_dropout(config: Config, form: Form, classifier: float | None) -> Dropout:
    """The dropouts of a config. The hidden one serves the embedding as well.

    Args:
        classifier: the pooled state's own; None where it is the hidden one.
    """
    hidden = config["hidden_dropout_prob"]
    pooled = hidden if classifier is None else classifier
    return Dropout(
        hidden=hidden,
        attention=config["attention_probs_dropout_prob"],
        embedding=hidden,
        classifier=pooled if form.drops else 0.0,
    )


def read_head(config: Config, form: Form, transform: str) -> Head:
    """The head that a class puts on.

    Args:
        transform: the activation of the masked-LM head's dense layer.
    """
    head = Head(pooler=form.pooler)
    if form.language:
        language = LanguageHead(tied=config["tie_word_embeddings"], transform=transform, bias=True)
        head = Head(language=language, pooler=form.pooler)
    if not form.classifier:
        return head
    labels = n_labels(config) if form.labels is None else form.labels
    return Head(language=head.language, pooler=form.pooler, classifier=Classifier(n_labels=labels))


# --- an architecture to config.json


def write_common(architecture: Architecture, name: str, forms: Forms) -> dict[str, Any]:
    """The keys that all three families write alike; the depth and the embedding's width are theirs to add."""
    stack, vocab = encoder_of(architecture), architecture.embedding
    class_name = class_of(architecture.head, forms)
    language = architecture.head.language
    config = {
        "architectures": [class_name],
        "model_type": name,
        "vocab_size": vocab.vocab_size,
        "hidden_size": architecture.d_model,
        "num_attention_heads": stack.attention.n_heads,
        "intermediate_size": stack.feed_forward.d_ff,
        "hidden_act": activation_to(stack.feed_forward.activation),
        "hidden_dropout_prob": architecture.dropout.hidden,
        "attention_probs_dropout_prob": architecture.dropout.attention,
        "max_position_embeddings": stack.positions.max_positions,
        "type_vocab_size": vocab.token_types,
        "initializer_range": architecture.initialisation.std,
        "layer_norm_eps": stack.norm.eps,
        "pad_token_id": architecture.tokens.pad,
        "bos_token_id": architecture.tokens.bos,
        "eos_token_id": ids_as_written(architecture.tokens.eos),
        "tie_word_embeddings": language is None or language.tied,
    }
    classifier = architecture.head.classifier
    if classifier is not None and forms[class_name].labels is None:
        config |= label_names(classifier.n_labels)
    return config


def classifier_dropout(architecture: Architecture) -> float | None:
    """The key that BERT and ELECTRA have for the pooled state's dropout: null where it is the hidden one."""
    dropout = architecture.dropout
    return None if dropout.classifier == dropout.hidden else dropout.classifier


def encoder_of(architecture: Architecture) -> Stack:
    """The encoder of an architecture that has passed `encoder_alone`."""
    assert architecture.encoder is not None
    return architecture.encoder


def class_of(head: Head, forms: Forms) -> str:
    """The stock class whose head is the nearest to `head`; the very one where the family holds it."""

    def likeness(name: str) -> tuple[bool, ...]:
        form = forms[name]
        same_parts = form.language == (head.language is not None), form.classifier == (head.classifier is not None)
        return (*same_parts, *_alike(head.pooler, form.pooler))

    return max(forms, key=likeness)


def _alike(one: Pooler | None, other: Pooler | None) -> tuple[bool, bool, bool]:
    """Whether two poolers are equal; read the same token, with or without a dense layer; read the same token."""
    if one is None or other is None:
        return (one == other,) * 3
    same_token = one.token == other.token
    same_dense = (one.activation is None) == (other.activation is None)
    return one == other, same_token and same_dense, same_token


# --- why a family cannot hold an architecture


def encoder_alone(name: str) -> Check:
    """The check that there is an encoder and no decoder."""

    def check(architecture: Architecture) -> Objection | None:
        # An architecture has at least one stack, so what is wrong here is always a decoder.
        if architecture.decoder is None:
            return None
        return Objection(f"it has a decoder, and {name} is an encoder alone", {})

    return check


def learned_positions(name: str) -> Check:
    """The check that positions are a learned table; the one proposed holds as many as there were, or 512."""

    def check(architecture: Architecture) -> Objection | None:
        positions = encoder_of(architecture).positions
        if positions.kind == "learned":
            return None
        table = Positions(kind="learned", max_positions=positions.max_positions or 512)
        return Objection(
            f"its positions are {positions.kind}, and {name} has learned ones", {"encoder.positions": table.to_dict()}
        )

    return check


def both_ways(name: str) -> Check:
    """The check that attention sees both sides; a window goes with looking back."""

    def check(architecture: Architecture) -> Objection | None:
        if not encoder_of(architecture).causal:
            return None
        changes = {"encoder.causal": False, "encoder.attention.window": None}
        return Objection(f"its encoder is causal, and {name} sees both sides", changes)

    return check


def heads_fill_the_width(name: str) -> Check:
    """The check that all heads together are as wide as the model, with one key-value head for each."""

    def check(architecture: Architecture) -> Objection | None:
        a, d_model = encoder_of(architecture).attention, architecture.d_model
        if a.d_q != d_model:
            changes: dict[str, Any] = dict(heads_that_fit(d_model, a.n_heads, a.d_head))
            if a.n_kv_heads is not None:
                changes["n_kv_heads"] = None
            return Objection(
                f"n_heads · d_head is {a.n_heads} · {a.d_head} = {a.d_q} and d_model is {d_model}; "
                f"{name} wants them equal",
                changes,
            )
        if a.kv_heads != a.n_heads:
            return Objection(
                f"n_kv_heads is {a.kv_heads} and n_heads is {a.n_heads}; {name} has a key-value head for each head",
                {"n_kv_heads": a.n_heads},
            )
        return None

    return check


def token_types(name: str) -> Check:
    """The check that there is a table of token types."""

    def check(architecture: Architecture) -> Objection | None:
        if architecture.embedding.token_types:
            return None
        return Objection(f"it has no token types, and {name} adds at least one to every token", {"token_types": 1})

    return check


def known_head(forms: Callable[[Architecture], Forms]) -> Check:
    """The check that one of the family's classes has this head."""

    def check(architecture: Architecture) -> Objection | None:
        head = architecture.head
        name = class_of(head, forms(architecture))
        form = forms(architecture)[name]
        changes: dict[str, Any] = {}
        if head.classifier is not None and not form.classifier:
            changes["head.classifier"] = None
        if head.language is not None and not form.language:
            changes["head.language"] = None
        if head.pooler != form.pooler:
            changes["head.pooler"] = None if form.pooler is None else form.pooler.to_dict()
        if not changes:
            return None
        return Objection(f"its head is {_shown(head)}, and the nearest class, {name}, has {_form_shown(form)}", changes)

    return check


def _shown(head: Head) -> str:
    return _form_shown(Form(head.language is not None, head.pooler, head.classifier is not None))


def _form_shown(form: Form) -> str:
    parts = ["a masked-LM head"] if form.language else []
    if form.pooler is not None:
        dense = f" through a {form.pooler.activation} layer" if form.pooler.activation else ""
        parts.append(f"{'labels' if form.classifier else 'a pooled state'} of {_PLACES[form.pooler.token]}{dense}")
    return " and ".join(parts) or "nothing"


_PLACES = {
    "first": "the first token",
    "last": "the last token",
    "eos": "the end-of-sequence token",
    "each": "each token",
}


def undropped(architecture: Architecture, forms: Forms) -> Architecture:
    """The architecture as a class reads it back that does not drop its pooled state.

    That class's config has no place for the probability. It changes training a little and nothing else, so it
    is no reason to keep the model out of the family's format.
    """
    if forms[class_of(architecture.head, forms)].drops:
        return architecture
    return architecture.with_({"dropout.classifier": 0.0})


# --- tensors


def linear(theirs: str, ours: str) -> Iterator[Entry]:
    """The two tensors of a linear layer with a bias, or of a LayerNorm."""
    for part in ("weight", "bias"):
        yield Entry(f"{theirs}.{part}", (f"{ours}.{part}",))


def embedding_entries(prefix: str) -> Iterator[Entry]:
    """The three tables and the norm of an embedding."""
    at = f"{prefix}embeddings"
    yield Entry(f"{at}.word_embeddings.weight", ("embedding.tokens.weight",))
    yield Entry(f"{at}.position_embeddings.weight", ("encoder.input.positions.weight",))
    yield Entry(f"{at}.token_type_embeddings.weight", ("encoder.input.token_types.weight",))
    yield from linear(f"{at}.LayerNorm", "encoder.input.norm")


def bert_layer_entries(prefix: str, index: int) -> Iterator[Entry]:
    """One layer under the names that BERT and ELECTRA share."""
    at, attention, mlp = f"{prefix}encoder.layer.{index}", f"encoder.attention.{index}", f"encoder.feed_forward.{index}"
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
        yield from linear(f"{at}.attention.self.{theirs}", f"{attention}.{ours}")
    yield from linear(f"{at}.attention.output.dense", f"{attention}.o")
    yield from linear(f"{at}.attention.output.LayerNorm", f"{attention}.norm")
    yield from linear(f"{at}.intermediate.dense", f"{mlp}.up")
    yield from linear(f"{at}.output.dense", f"{mlp}.down")
    yield from linear(f"{at}.output.LayerNorm", f"{mlp}.norm")


def output_entries(at: str, language: LanguageHead) -> Iterator[Entry]:
    """The output table and its bias as BERT and ALBERT store them.

    The bias has two names, `bias` and `decoder.bias`, one parameter in a tied model. In an untied model
    transformers 5 makes them two parameters, reads `decoder.bias`, and calls either one that is missing newly
    initialised; transformers 4 makes them one and stores `bias`. So an untied file holds the same bias twice.
    """
    first, second, ours = f"{at}.bias", f"{at}.decoder.bias", ("head.language.output.bias",)
    if language.tied:
        yield Entry(first, ours, copies=(second,))
    else:
        yield Entry(f"{at}.decoder.weight", ("head.language.output.weight",))
        yield Entry(second, ours, shadows=(first,))
