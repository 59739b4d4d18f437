"""Which of llama.cpp's model graphs an architecture is, and where its tensors go in a GGUF file.

llama.cpp has a graph for each kind of model, written out in C++, so a file can hold exactly the choices that the graph
makes: `llama` has RMSNorm, a gated SiLU and rotary positions, whoever trained it. A `Layout` is such a graph as data:
the choices that it makes, the sizes as GGUF keys, and GGUF's names beside the blueprint's. Which one fits is read off
the architecture: rotary decoders, decoders with a position table, encoders with one, and relative positions.

What the graphs do beside the weights:
- `llama` turns neighbouring channels of a head, (0, 1), (2, 3), …, where Lathe and Hugging Face turn (i, i + K/2). The
  rows of q and k are put in that order, which leaves every product of the two as it was.
- `t5` does not scale the states before a tied head. RMSNorm multiplies by its weight last, so the scale goes into it.
- Rotary scaling, of any kind, is a factor for each frequency (`rope_freqs`), by which llama.cpp divides it.
- A layer that shares its weights with another has its own copy: GGUF names each layer's.
- GELU is the tanh form everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture, LanguageHead, Pooler, Stack
from lathe.model.positions import stretch

YES_NO = (False, True)

# Parts of a layer, ours to theirs; several of ours are concatenated.
Parts = Mapping[tuple[str, ...], str]

_ATTENTION: Parts = {("attention.q",): "attn_q", ("attention.k",): "attn_k", ("attention.v",): "attn_v"}
_FEED_FORWARD: Parts = {
    ("feed_forward.gate",): "ffn_gate",
    ("feed_forward.up",): "ffn_up",
    ("feed_forward.down",): "ffn_down",
}
_PRE_NORM: Parts = {("attention.norm",): "attn_norm", ("feed_forward.norm",): "ffn_norm"}
_CROSS: Parts = {(f"cross_attention.{part}",): f"cross_attn_{part}" for part in ("q", "k", "v", "o", "norm")}

_T5_PARTS: Parts = {**_PRE_NORM, **_ATTENTION, ("attention.o",): "attn_o", **_FEED_FORWARD, **_CROSS}
_LLAMA_PARTS: Parts = {**_PRE_NORM, **_ATTENTION, ("attention.o",): "attn_output", **_FEED_FORWARD}
_GPT2_PARTS: Parts = {
    **_PRE_NORM,
    ("attention.q", "attention.k", "attention.v"): "attn_qkv",
    ("attention.o",): "attn_output",
    **_FEED_FORWARD,
}
_BERT_PARTS: Parts = {
    **_ATTENTION,
    ("attention.o",): "attn_output",
    ("attention.norm",): "attn_output_norm",
    **_FEED_FORWARD,
    ("feed_forward.norm",): "layer_output_norm",
}


@dataclass(frozen=True)
class Layout:
    """One of llama.cpp's graphs.

    Args:
        name: `general.architecture`.
        choices: fields of each stack to the values that the graph allows.
        parts: the tensors of a layer.
        prefixes: what stands before a stack's layers, by stack.
        norms: the final norm of each stack.
        fills: whether all heads together have to be as wide as the model.
    """

    name: str
    choices: Mapping[str, tuple[Any, ...]]
    parts: Parts
    prefixes: Mapping[str, str]
    norms: Mapping[str, str]
    fills: bool = False


_PRE = {"norm_position": ("pre",), "input_norm": (False,), "final_norm": (True,)}
_RELATIVE: dict[str, tuple[Any, ...]] = {
    **_PRE,
    "norm.kind": ("rms",),
    "attention.scaled": (False,),
    "attention.bias": (False,),
    "attention.output_bias": (False,),
    "attention.n_kv_heads": (None,),
    "feed_forward.bias": (False,),
    "positions.max_distance": (128,),
}
_TABLE: dict[str, tuple[Any, ...]] = {
    "norm.kind": ("layer",),
    "norm.bias": (True,),
    "attention.scaled": (True,),
    "attention.n_kv_heads": (None,),
    "feed_forward.gated": (False,),
}

LLAMA = Layout(
    name="llama",
    choices={
        **_PRE,
        "norm.kind": ("rms",),
        "attention.scaled": (True,),
        "feed_forward.gated": (True,),
        "feed_forward.activation": ("silu",),
        "causal": (True,),
    },
    parts=_LLAMA_PARTS,
    prefixes={"decoder": ""},
    norms={"decoder": "output_norm"},
)
GPT2 = Layout(
    name="gpt2",
    choices={
        **_PRE,
        **_TABLE,
        "feed_forward.activation": ("gelu_tanh", "gelu"),
        "attention.bias": (True,),
        "attention.output_bias": (True,),
        "feed_forward.bias": (True,),
        "attention.window": (None,),
        "causal": (True,),
    },
    parts=_GPT2_PARTS,
    prefixes={"decoder": ""},
    norms={"decoder": "output_norm"},
    fills=True,
)
BERT = Layout(
    name="bert",
    choices={
        **_TABLE,
        "norm_position": ("post",),
        "input_norm": (True,),
        "final_norm": (False,),
        "feed_forward.activation": ("gelu", "gelu_tanh"),
        "causal": (False,),
    },
    parts=_BERT_PARTS,
    prefixes={"encoder": ""},
    norms={},
    fills=True,
)
T5 = Layout(
    name="t5",
    choices=_RELATIVE,
    parts=_T5_PARTS,
    prefixes={"encoder": "enc.", "decoder": "dec."},
    norms={"encoder": "enc.output_norm", "decoder": "dec.output_norm"},
)
T5_ENCODER = Layout(
    name="t5encoder",
    choices={**_RELATIVE, "causal": (False,)},
    parts=_T5_PARTS,
    prefixes={"encoder": "enc."},
    norms={"encoder": "enc.output_norm"},
)

# The stacks that there are and the kind of their positions, to the graph that has both.
_LAYOUTS: dict[tuple[tuple[str, str], ...], Layout] = {
    (("decoder", "rotary"),): LLAMA,
    (("decoder", "learned"),): GPT2,
    (("encoder", "learned"),): BERT,
    (("encoder", "relative"), ("decoder", "relative")): T5,
    (("encoder", "relative"),): T5_ENCODER,
}


def layout_of(architecture: Architecture) -> Layout | None:
    """The graph that an architecture would be run by; None where llama.cpp has none of its kind."""
    kinds = tuple((name, stack.positions.kind) for name, stack in architecture.stacks)
    return _LAYOUTS.get(kinds)


# --- what does not fit -------------------------------------------------------------------------------------


def objections(architecture: Architecture) -> list[str]:
    """Why no GGUF file can hold an architecture; nothing where one can."""
    layout = layout_of(architecture)
    if layout is None:
        kinds = " and ".join(f"a {stack.positions.kind} {name}" for name, stack in architecture.stacks)
        runs = "rotary or learned decoders, learned or relative encoders, and relative encoder-decoders"
        return [f"its positions make it {kinds}, and llama.cpp runs {runs}"]
    return [
        *_of_the_embedding(architecture),
        *_of_the_stacks(architecture, layout),
        *_of_the_head(architecture, layout),
    ]


def _of_the_embedding(architecture: Architecture) -> Iterator[str]:
    embedding = architecture.embedding
    if embedding.d_embed is not None:
        yield f"its embedding is factorised (d_embed is {embedding.d_embed}), and a GGUF table is as wide as the model"
    if embedding.scaled:
        yield "its token vectors are scaled, which llama.cpp's graph does not do"
    if embedding.token_types and architecture.decoder is not None:
        yield "its decoder has token types, and llama.cpp's has none"


def _of_the_stacks(architecture: Architecture, layout: Layout) -> Iterator[str]:
    for name, stack in architecture.stacks:
        for path, allowed in layout.choices.items():
            value = _at(stack, path)
            if value not in allowed:
                wanted = " or ".join(str(each).lower() for each in allowed)
                yield f"its {name}'s {path} is {str(value).lower()}, and llama.cpp's {layout.name} has {wanted}"
        if layout.fills and stack.attention.d_q != architecture.d_model:
            yield (
                f"n_heads · d_head is {stack.attention.d_q} and d_model is {architecture.d_model}, which llama.cpp's "
                f"{layout.name} takes as equal"
            )
        if stack.positions.offset:
            yield f"its position table starts {stack.positions.offset} rows early, and llama.cpp's does not"
    if layout is T5 or layout is T5_ENCODER:
        yield from _of_relative_stacks([stack for _, stack in architecture.stacks], layout)


def _of_relative_stacks(stacks: list[Stack], layout: Layout) -> Iterator[str]:
    gated, activation = stacks[0].feed_forward.gated, stacks[0].feed_forward.activation
    wanted = "gelu_tanh" if gated else "relu"
    if activation not in (wanted, *(["gelu"] if gated else [])):
        yield (
            f"its {'gated' if gated else 'plain'} feed-forward has {activation}, and llama.cpp's {layout.name} has "
            f"{wanted} there"
        )
    one = [(s.attention.n_heads, s.attention.d_head, s.feed_forward, s.norm.eps, s.positions.n_buckets) for s in stacks]
    if len(set(one)) > 1:
        yield "its encoder and decoder differ in heads, feed-forward, eps or buckets, and GGUF has one number for both"
    if len(stacks) > 1 and stacks[1].n_layers > stacks[0].n_layers:
        yield (
            f"its decoder has {stacks[1].n_layers} layers and its encoder {stacks[0].n_layers}, and llama.cpp opens no "
            "file whose decoder is the deeper one"
        )


def _of_the_head(architecture: Architecture, layout: Layout) -> Iterator[str]:
    head = architecture.head
    if architecture.decoder is not None:
        if head.language is None or head.pooler is not None or head.classifier is not None:
            yield "llama.cpp runs a decoder to get tokens, and this one has another head or none"
        elif head.language not in [LanguageHead(tied=tied, scaled=scaled) for tied in YES_NO for scaled in YES_NO]:
            yield "its token head has a bias or a dense layer, and llama.cpp's is one matrix"
        return
    if head.language is not None:
        yield "its encoder has a token head, and llama.cpp's encoders have none (--body leaves it out)"
    if layout is T5_ENCODER and (head.pooler is not None or head.classifier is not None):
        yield "it has a classifier, and llama.cpp's encoder with relative positions has none (--body leaves it out)"
    elif head.classifier is not None and head.pooler not in (
        Pooler(token="first", activation="tanh"),
        Pooler(token="first"),
    ):
        yield "its classifier does not read the first token through nothing or a tanh layer, as llama.cpp's does"


def _at(stack: Stack, path: str) -> Any:
    value: Any = stack
    for key in path.split("."):
        value = getattr(value, key)
    return value


# --- sizes -------------------------------------------------------------------------------------------------


def context_length(architecture: Architecture) -> int:
    """How many tokens the file says that the model is for."""
    stack = next(architecture.stacks)[1]
    longest = stack.positions.max_positions or 512  # relative positions have no end; what T5 was trained on
    return min(longest, stack.attention.window or longest)


def sizes(architecture: Architecture) -> dict[str, Any]:
    """The model's GGUF keys, after its architecture's name and a dot."""
    layout = layout_of(architecture)
    assert layout is not None
    stack = next(architecture.stacks)[1]
    keys: dict[str, Any] = {
        "vocab_size": architecture.embedding.vocab_size,
        "context_length": context_length(architecture),
        "embedding_length": architecture.d_model,
        "block_count": stack.n_layers,
        "feed_forward_length": stack.feed_forward.d_ff,
        "attention.head_count": stack.attention.n_heads,
        "attention.head_count_kv": stack.attention.kv_heads,
        "attention.key_length": stack.attention.d_head,
        "attention.value_length": stack.attention.d_head,
        "attention.causal": architecture.decoder is not None,
        f"attention.layer_norm_{'rms_' if stack.norm.kind == 'rms' else ''}epsilon": stack.norm.eps,
    }
    if stack.positions.kind == "rotary":
        keys |= {"rope.dimension_count": stack.attention.d_head, "rope.freq_base": stack.positions.theta}
    if stack.positions.kind == "relative":
        keys["attention.relative_buckets_count"] = stack.positions.n_buckets
    if architecture.encoder is not None and architecture.decoder is not None:
        keys["decoder_block_count"] = architecture.decoder.n_layers
        keys["decoder_start_token_id"] = architecture.tokens.decoder_start or 0
    if architecture.decoder is None:
        keys["pooling_type"] = 1 if architecture.head.classifier is None else 4  # the mean; what a classifier reads
    if architecture.head.classifier is not None:
        keys["classifier.output_labels"] = [f"LABEL_{i}" for i in range(architecture.head.classifier.n_labels)]
    return keys


# --- tensors -----------------------------------------------------------------------------------------------


def placed(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its GGUF name, out × in as everywhere."""
    layout = layout_of(architecture)
    assert layout is not None
    yield "token_embd.weight", tensors["embedding.tokens.weight"]
    for name, stack in architecture.stacks:
        yield from _around(name, stack, architecture, layout, tensors)
        for layer in range(stack.n_layers):
            yield from _layer(name, stack, layer, layout, tensors)
    head = architecture.head
    if head.language is not None and not head.language.tied:
        yield "output.weight", tensors["head.language.output.weight"]
    if head.classifier is not None:
        yield from _leaves("cls.output", ("head.classifier",), tensors)
        yield from _leaves("cls", ("head.pooler",), tensors)


def _around(
    name: str, stack: Stack, architecture: Architecture, layout: Layout, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What stands before and after a stack's layers."""
    if stack.positions.kind == "learned":
        yield "position_embd.weight", tensors[f"{name}.input.positions.weight"]
    if architecture.embedding.token_types:
        yield "token_types.weight", tensors[f"{name}.input.token_types.weight"]
    yield from _leaves("token_embd_norm", (f"{name}.input.norm",), tensors)
    if stack.positions.kind == "relative":
        yield f"{layout.prefixes[name]}blk.0.attn_rel_b.weight", tensors[f"{name}.relative_bias.weight"]
    if stack.positions.scaling is not None:
        exponents = torch.arange(0, stack.attention.d_head, 2, dtype=torch.float32) / stack.attention.d_head
        frequencies = 1.0 / stack.positions.theta**exponents
        yield "rope_freqs.weight", frequencies / stretch(frequencies, stack.positions.scaling)
    if name in layout.norms:
        scaled = architecture.head.language is not None and architecture.head.language.scaled
        factor = architecture.d_model**-0.5 if scaled and name == "decoder" else 1.0
        for theirs, tensor in _leaves(layout.norms[name], (f"{name}.norm",), tensors):
            yield theirs, tensor * factor


def _layer(
    name: str, stack: Stack, layer: int, layout: Layout, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for parts, theirs in layout.parts.items():
        ours = []
        for part in parts:
            half, leaf = part.split(".")
            index = stack.feed_forward_index(layer) if half == "feed_forward" else stack.attention_index(layer)
            ours.append(f"{name}.{half}.{index}.{leaf}")
        turned = parts[0][-1] if stack.positions.kind == "rotary" and parts[0] in ("attention.q", "attention.k") else ""
        heads = {"q": stack.attention.n_heads, "k": stack.attention.kv_heads, "": 0}[turned]
        for their_name, tensor in _leaves(f"{layout.prefixes[name]}blk.{layer}.{theirs}", tuple(ours), tensors):
            yield their_name, neighbours(tensor, heads) if heads else tensor


def _leaves(theirs: str, ours: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weight and the bias, where there are such tensors."""
    for leaf in ("weight", "bias"):
        parts = [tensors[f"{each}.{leaf}"] for each in ours if f"{each}.{leaf}" in tensors]
        if parts:
            yield f"{theirs}.{leaf}", torch.cat(parts)


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order in which channels that turn together are neighbours: 0, K/2, 1, K/2 + 1, …"""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


# --- what its user has to know -----------------------------------------------------------------------------


def notes(architecture: Architecture) -> list[str]:
    """Where llama.cpp computes a little differently, or leaves something out."""
    said = []
    for name, stack in architecture.stacks:
        if stack.feed_forward.activation == "gelu":
            said.append(f"its {name} has the exact GELU, and llama.cpp computes the tanh form (0.0005 apart at most)")
        if stack.attention.window is not None and stack.attention.window < (stack.positions.max_positions or 0):
            said.append(
                f"llama.cpp has no window here: it is the model up to {stack.attention.window} tokens, which the file "
                "names as its context"
            )
        if str(stack.sharing) != "none":
            said.append(f"its {name} shares weights between layers, and GGUF holds each layer's copy")
    if architecture.embedding.token_types > 1:
        said.append("llama.cpp gives every token the first token type")
    return said
