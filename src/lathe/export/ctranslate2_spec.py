"""An architecture and its weights as CTranslate2's own description of a model.

CTranslate2 runs one transformer too, and its `specs` say which: an encoder, a decoder or both, with the norm before or
after, learned, rotary or relative positions, gated or plain feed-forwards. So the blueprint is laid onto a spec field
by field, and what CTranslate2 can run is asked of the architecture and not of a family's name. Its own converter reads
stock checkpoints by their class; this way also holds what no stock class does, and needs no `transformers`.

Fused weights: q, k and v of self-attention are one matrix; of cross-attention, k and v are. A gated feed-forward's
activated half is `linear_0`, the other `linear_0_noact`. Layers that share weights each name the shared tensors, and
CTranslate2 stores equal tensors once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture, Stack
from lathe.model.positions import sinusoid

_ACTIVATIONS = {
    "relu": "RELU",
    "gelu": "GELU",
    "gelu_tanh": "GELUTanh",
    "quick_gelu": "GELUSigmoid",
    "silu": "SWISH",
    "tanh": "Tanh",
}


def objections(architecture: Architecture) -> list[str]:
    """Why CTranslate2 cannot run an architecture; nothing where it can."""
    return [*_of_the_head(architecture), *_of_the_embedding(architecture), *_of_the_stacks(architecture)]


def _of_the_head(architecture: Architecture) -> Iterator[str]:
    head = architecture.head
    if architecture.decoder is None:
        if head.language is not None:
            yield "its encoder has a token head, and CTranslate2's encoders have none (--body leaves it out)"
        if head.classifier is not None:
            yield "it has a classifier, and CTranslate2 has none (--body leaves it out)"
        if head.pooler is not None and head.pooler.activation is not None and head.pooler.token != "first":
            yield f"its pooler reads the {head.pooler.token} token, and CTranslate2's reads the first"
        return
    if head.language is None:
        yield "it has no token head, and CTranslate2 runs a decoder to get tokens"
        return
    if head.language.transform is not None:
        yield "its token head has a dense layer, and CTranslate2's is one matrix"
    if head.pooler is not None or head.classifier is not None:
        yield "it has a pooler or a classifier beside the token head, and CTranslate2 has a token head alone"


def _of_the_embedding(architecture: Architecture) -> Iterator[str]:
    embedding, alone = architecture.embedding, architecture.encoder is None
    if embedding.d_embed is not None:
        stack = next(architecture.stacks)[1]
        if not alone or stack.positions.kind != "rotary" or stack.input_norm:
            yield (
                f"its embedding is factorised (d_embed is {embedding.d_embed}), and CTranslate2 lifts one to the "
                "model's width in a decoder alone with rotary positions"
            )
    if embedding.token_types and architecture.decoder is not None:
        yield "it has token types, and CTranslate2 reads them in an encoder alone"


def _of_the_stacks(architecture: Architecture) -> Iterator[str]:
    stacks = [stack for _, stack in architecture.stacks]
    if len({stack.norm.eps for stack in stacks}) > 1:
        yield "its encoder and decoder have norms of different eps, and CTranslate2 has one eps"
    for name, stack in architecture.stacks:
        if stack.causal != (name == "decoder"):
            yield f"its {name} is {'' if stack.causal else 'not '}causal, and CTranslate2's {name} is the other way"
        if stack.norm_position == "post" and stack.final_norm:
            yield f"its {name} norms after each sublayer and once more at the end, and CTranslate2 does one of the two"
        if stack.positions.kind == "none":
            yield f"its {name} has no positions, and CTranslate2 would add sinusoidal ones"
        if stack.positions.scaling is not None and stack.positions.scaling.kind != "linear":
            yield f"its rotary positions scale as {stack.positions.scaling.kind}, of which CTranslate2 keeps no factor"
        if stack.positions.kind == "rotary" and stack.cross_attention:
            yield f"its {name} has rotary positions beside cross-attention, which CTranslate2 would turn as well"


def make(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Any:
    """CTranslate2's spec of a model that `objections` lets through, without vocabulary and tokens."""
    from ctranslate2.specs import transformer_spec

    encoder = decoder = None
    if architecture.encoder is not None:
        types = architecture.embedding.token_types
        encoder = transformer_spec.TransformerEncoderSpec(
            **_settings(architecture.encoder),
            num_source_embeddings=2 if types else 1,
            embeddings_merge=_common().EmbeddingsMerge.ADD,
        )
        _fill(encoder, "encoder", architecture, tensors)
        if types:
            encoder.embeddings[1].weight = tensors["encoder.input.token_types.weight"]
    if architecture.decoder is not None:
        decoder = transformer_spec.TransformerDecoderSpec(
            **_settings(architecture.decoder),
            with_encoder_attention=architecture.decoder.cross_attention,
            project_in_out=architecture.embedding.d_embed is not None,
        )
        _fill(decoder, "decoder", architecture, tensors)
        _token_head(decoder, architecture, tensors)
    if decoder is None:
        spec = _encoder_alone(encoder, architecture, tensors)
    elif encoder is None:
        spec = transformer_spec.TransformerDecoderModelSpec(decoder)
    else:
        spec = transformer_spec.TransformerSpec(encoder, decoder)
    spec.config.layer_norm_epsilon = next(architecture.stacks)[1].norm.eps
    return spec


def _common() -> Any:
    from ctranslate2.specs import common_spec

    return common_spec


def _activation(name: str) -> Any:
    return getattr(_common().Activation, _ACTIVATIONS[name])


def _settings(stack: Stack) -> dict[str, Any]:
    """What both of CTranslate2's stacks are told alike."""
    from ctranslate2.specs import attention_spec

    attention, positions = stack.attention, stack.positions
    settings: dict[str, Any] = {
        "num_layers": stack.n_layers,
        "num_heads": attention.n_heads,
        "num_heads_kv": attention.n_kv_heads,
        "head_dim": attention.d_head,
        "pre_norm": stack.norm_position == "pre",
        "no_final_norm": not stack.final_norm,
        "activation": _activation(stack.feed_forward.activation),
        "layernorm_embedding": stack.input_norm,
        "relative_attention_bias": positions.kind == "relative",
        "ffn_glu": stack.feed_forward.gated,
        "rms_norm": stack.norm.kind == "rms",
        "sliding_window": attention.window,
    }
    if positions.kind == "rotary":
        settings |= {"rotary_dim": 0, "rotary_interleave": False, "rotary_base": positions.theta}
        if positions.scaling is not None:
            settings |= {
                "rotary_scaling_type": attention_spec.RotaryScalingType.Linear,
                "rotary_scaling_factor": positions.scaling.factor,
            }
    return settings


def _fill(spec: Any, name: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Put a stack's weights where its spec has them."""
    stack = dict(architecture.stacks)[name]
    table = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    table.weight = tensors["embedding.tokens.weight"]
    spec.scale_embeddings = architecture.width**0.5 if architecture.embedding.scaled else False
    if architecture.embedding.d_embed is not None:
        _linear(spec.project_in, tensors, "embedding.projection")
    if stack.positions.kind in ("learned", "sinusoidal"):
        spec.position_encodings.encodings = _position_table(name, stack, architecture.width, tensors)
    if stack.input_norm:
        _norm(spec.layernorm_embedding, tensors, f"{name}.input.norm")
    if stack.final_norm:
        _norm(spec.layer_norm, tensors, f"{name}.norm")
    for number, layer in enumerate(spec.layer):
        index = stack.attention_index(number)
        _attention(layer.self_attention, stack, tensors, f"{name}.attention.{index}", fused=("qkv",))
        if stack.positions.kind == "relative":
            layer.self_attention.relative_attention_bias = tensors[f"{name}.relative_bias.weight"]
            layer.self_attention.relative_attention_max_distance = _int32(stack.positions.max_distance)
        if stack.cross_attention:
            _attention(layer.attention, stack, tensors, f"{name}.cross_attention.{index}", fused=("q", "kv"))
        feed_forward = f"{name}.feed_forward.{stack.feed_forward_index(number)}"
        _norm(layer.ffn.layer_norm, tensors, f"{feed_forward}.norm")
        if stack.feed_forward.gated:
            _linear(layer.ffn.linear_0, tensors, f"{feed_forward}.gate")
            _linear(layer.ffn.linear_0_noact, tensors, f"{feed_forward}.up")
        else:
            _linear(layer.ffn.linear_0, tensors, f"{feed_forward}.up")
        _linear(layer.ffn.linear_1, tensors, f"{feed_forward}.down")


def _int32(value: int) -> Any:
    import numpy as np

    return np.dtype("int32").type(value)


def _position_table(name: str, stack: Stack, width: int, tensors: Mapping[str, Tensor]) -> Tensor:
    positions = stack.positions
    if positions.kind == "learned":
        return tensors[f"{name}.input.positions.weight"][positions.offset :]
    assert positions.max_positions is not None
    return sinusoid(torch.arange(positions.max_positions), width)


def _attention(spec: Any, stack: Stack, tensors: Mapping[str, Tensor], ours: str, fused: tuple[str, ...]) -> None:
    _norm(spec.layer_norm, tensors, f"{ours}.norm")
    for linear, letters in zip(spec.linear, fused):
        linear.weight = torch.cat([tensors[f"{ours}.{letter}.weight"] for letter in letters])
        if stack.attention.bias:
            linear.bias = torch.cat([tensors[f"{ours}.{letter}.bias"] for letter in letters])
    _linear(spec.linear[-1], tensors, f"{ours}.o")
    if not stack.attention.scaled:
        spec.queries_scale = 1.0


def _linear(spec: Any, tensors: Mapping[str, Tensor], ours: str) -> None:
    spec.weight = tensors[f"{ours}.weight"]
    if f"{ours}.bias" in tensors:
        spec.bias = tensors[f"{ours}.bias"]


def _norm(spec: Any, tensors: Mapping[str, Tensor], ours: str) -> None:
    spec.gamma = tensors[f"{ours}.weight"]
    if hasattr(spec, "beta"):  # a LayerNorm without a bias is one whose bias is zero
        spec.beta = tensors.get(f"{ours}.bias", torch.zeros_like(spec.gamma))


def _token_head(spec: Any, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    head = architecture.head.language
    assert head is not None
    spec.projection.weight = tensors["embedding.tokens.weight" if head.tied else "head.language.output.weight"]
    biases = [
        tensors[f"head.language.{name}"] for name in ("output.bias", "offset") if f"head.language.{name}" in tensors
    ]
    if biases:
        spec.projection.bias = torch.stack(biases).sum(0)
    if head.scaled:
        spec.scale_outputs = architecture.d_model**-0.5
    if architecture.embedding.d_embed is not None:
        _linear(spec.project_out, tensors, "head.language.projection")


def _encoder_alone(encoder: Any, architecture: Architecture, tensors: Mapping[str, Tensor]) -> Any:
    from ctranslate2.specs import transformer_spec

    pooler = architecture.head.pooler
    if pooler is None or pooler.activation is None:
        return transformer_spec.TransformerEncoderModelSpec(encoder)
    spec = transformer_spec.TransformerEncoderModelSpec(
        encoder, pooling_layer=True, pooling_activation=_activation(pooler.activation)
    )
    _linear(spec.pooler_dense, tensors, "head.pooler")
    return spec
