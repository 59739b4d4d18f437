"""GPT-2 (Radford et al. 2019, §2.3): a pre-norm decoder with learned positions and a tied head.

Hugging Face keeps OpenAI's `Conv1D`, whose weights are stored `in × out`, and one `c_attn` for query, key and
value. The width of the heads follows from the model's: `n_embd` is always `n_head` heads wide.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    heads_that_fit,
    ids_as_written,
    ids_of,
    label_names,
    token,
    whole,
)
from lathe.families.decoder_only import Classes, decoder_alone, read_head, write_class

CLASSES = Classes("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification")
PREFIX = "transformer."

# The names that other families' configs use for GPT-2's keys; the stock class takes either.
SYNONYMS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read(config: Config, class_name: str) -> Architecture:
    """A GPT-2 config as an architecture."""
    config = {SYNONYMS.get(key, key): value for key, value in config.items()}
    # The first scales layer by layer and the second casts scores, neither of which Lathe's attention does.
    expect(config, "scale_attn_by_inverse_layer_idx", False)
    expect(config, "reorder_and_upcast_attn", False)
    expect(config, "add_cross_attention", False)
    d_model, n_heads = whole(config, "n_embd", 768), whole(config, "n_head", 12)
    if d_model % n_heads:
        raise RequestError(f"n_embd={d_model} and n_head={n_heads} in the config: expected heads that divide the width")
    vocab_size = whole(config, "vocab_size", 50257)
    return Architecture(
        d_model=d_model,
        embedding=Embedding(vocab_size=vocab_size),
        decoder=Stack(
            n_layers=whole(config, "n_layer", 12),
            attention=Attention(
                n_heads=n_heads, d_head=d_model // n_heads, scaled=given(config, "scale_attn_weights", True)
            ),
            feed_forward=FeedForward(
                d_ff=whole(config, "n_inner", 4 * d_model),
                activation=activation_from(given(config, "activation_function", "gelu_new"), "activation_function"),
            ),
            norm=Norm(eps=given(config, "layer_norm_epsilon", 1e-5)),
            positions=Positions(kind="learned", max_positions=whole(config, "n_positions", 1024)),
            causal=True,
        ),
        head=read_head(config, class_name, CLASSES, tied=True),
        tokens=Tokens(
            pad=token(config, "pad_token_id", vocab_size),
            bos=token(config, "bos_token_id", vocab_size, 50256),
            eos=ids_of(token(config, "eos_token_id", vocab_size, 50256)),
        ),
        dropout=Dropout(
            hidden=given(config, "resid_pdrop", 0.1),
            attention=given(config, "attn_pdrop", 0.1),
            embedding=given(config, "embd_pdrop", 0.1),
        ),
        initialisation=Initialisation(std=given(config, "initializer_range", 0.02), scaled_residual=True),
        family="gpt2",
    )


def write(architecture: Architecture) -> dict[str, Any]:
    """An architecture as a GPT-2 config."""
    decoder, language = architecture.decoder, architecture.head.language
    assert decoder is not None
    config: dict[str, Any] = {
        "architectures": [write_class(architecture, CLASSES)],
        "model_type": "gpt2",
        "vocab_size": architecture.embedding.vocab_size,
        "n_positions": decoder.positions.max_positions,
        "n_embd": architecture.d_model,
        "n_layer": decoder.n_layers,
        "n_head": decoder.attention.n_heads,
        "n_inner": decoder.feed_forward.d_ff,
        "activation_function": activation_to(decoder.feed_forward.activation),
        "scale_attn_weights": decoder.attention.scaled,
        "layer_norm_epsilon": decoder.norm.eps,
        "resid_pdrop": architecture.dropout.hidden,
        "attn_pdrop": architecture.dropout.attention,
        "embd_pdrop": architecture.dropout.embedding,
        "initializer_range": architecture.initialisation.std,
        "pad_token_id": architecture.tokens.pad,
        "bos_token_id": architecture.tokens.bos,
        "eos_token_id": ids_as_written(architecture.tokens.eos),
        "tie_word_embeddings": language is None or language.tied,
    }
    if architecture.head.classifier is not None:
        config |= label_names(architecture.head.classifier.n_labels)
    return config


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every tensor of a GPT-2 file."""
    decoder, head = architecture.decoder, architecture.head
    assert decoder is not None
    prefix = PREFIX if head.language is not None or head.classifier is not None else ""
    yield Entry(f"{prefix}wte.weight", ("embedding.tokens.weight",))
    yield Entry(f"{prefix}wpe.weight", ("decoder.input.positions.weight",))
    for layer in range(decoder.n_layers):
        yield from _layer(f"{prefix}h.{layer}", f"decoder.attention.{layer}", f"decoder.feed_forward.{layer}")
    for leaf in ("weight", "bias"):
        yield Entry(f"{prefix}ln_f.{leaf}", (f"decoder.norm.{leaf}",))
    if head.language is not None and not head.language.tied:
        yield Entry("lm_head.weight", ("head.language.output.weight",))
    if head.classifier is not None:
        yield Entry("score.weight", ("head.classifier.weight",))


def _layer(theirs: str, attention: str, feed_forward: str) -> Iterator[Entry]:
    maps = (
        ("attn.c_attn", tuple(f"{attention}.{part}" for part in "qkv")),
        ("attn.c_proj", (f"{attention}.o",)),
        ("mlp.c_fc", (f"{feed_forward}.up",)),
        ("mlp.c_proj", (f"{feed_forward}.down",)),
    )
    for norm, ours in (("ln_1", f"{attention}.norm"), ("ln_2", f"{feed_forward}.norm")):
        for leaf in ("weight", "bias"):
            yield Entry(f"{theirs}.{norm}.{leaf}", (f"{ours}.{leaf}",))
    for name, parts in maps:
        yield Entry(f"{theirs}.{name}.weight", tuple(f"{part}.weight" for part in parts), transposed=True)
        yield Entry(f"{theirs}.{name}.bias", tuple(f"{part}.bias" for part in parts))


def objections(architecture: Architecture) -> list[Objection]:
    """Why GPT-2's format cannot hold an architecture."""
    return find_objections(architecture, (decoder_alone("gpt2", "learned"), _grouped, _heads), read, write)


def _grouped(architecture: Architecture) -> Objection | None:
    assert architecture.decoder is not None
    attention = architecture.decoder.attention
    if attention.kv_heads == attention.n_heads:
        return None
    reason = (
        f"{attention.n_heads} query heads share {attention.kv_heads} key-value heads, and a gpt2 has as many of each"
    )
    return Objection(reason, {"n_kv_heads": None})


def _heads(architecture: Architecture) -> Objection | None:
    assert architecture.decoder is not None
    attention, d_model = architecture.decoder.attention, architecture.d_model
    if attention.d_q == d_model:
        return None
    changes = heads_that_fit(d_model, attention.n_heads, attention.d_head)
    if attention.n_kv_heads is not None:
        changes["n_kv_heads"] = changes["n_heads"]
    return Objection(f"n_heads · d_head is {attention.d_q} and d_model is {d_model}", changes)


GPT2 = Family(
    name="gpt2",
    read=read,
    write=write,
    entries=entries,
    objections=objections,
    classes=CLASSES,
    prefix=PREFIX,
    other_heads=("lm_head.weight", "score.weight", "multiple_choice_head.*", "classifier.*", "qa_outputs.*"),
    # Older files store the causal mask of each layer.
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    stale=tuple(SYNONYMS),
)
FAMILIES = (GPT2,)
