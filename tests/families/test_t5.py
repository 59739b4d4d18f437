"""T5, T5 1.1 and mT5 against their twins in `transformers`, and what their published files look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from tests.families.contract import FamilyContract, Outside, Variant, read

# Three heads of six are 18, beside a width of 20; the stacks differ in depth.
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "d_model": 20,
    "d_kv": 6,
    "num_heads": 3,
    "d_ff": 28,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
GATED = {**SMALL, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LM = "T5ForConditionalGeneration"
ACTIVATIONS = ("gelu", "gelu_new", "silu", "quick_gelu", "tanh", "gated-relu", "gated-silu", "gated-gelu_python")


class TestT5(FamilyContract):
    variants = (
        Variant(LM, SMALL, "tied"),
        Variant(LM, GATED, "1.1", untied=True),
        Variant(LM, GATED, "tied-unscaled"),
        Variant(LM, {**SMALL, "num_heads": 5, "d_kv": 4}, "untied-scaled", untied=True),
        *(Variant(LM, {**SMALL, "num_layers": 1, "feed_forward_proj": name}, name) for name in ACTIVATIONS),
        Variant(LM, {**SMALL, "num_decoder_layers": 1, "num_heads": 1, "d_kv": 1}, "one-narrow-head"),
        Variant("T5Model", SMALL),
        Variant("T5EncoderModel", GATED),
        Variant("T5ForSequenceClassification", {**SMALL, "num_labels": 5}),
        Variant("T5ForTokenClassification", {**GATED, "num_labels": 4}),
    )
    outside = (
        Outside({"encoder.norm_position": "post"}, "encoder.norm_position is post"),
        Outside({"d_embed": 8}, "embedding.d_embed is 8"),
        Outside({"sharing": "feed_forward"}, "decoder.sharing is feed_forward"),
        Outside({"encoder.attention.d_head": 4}, "decoder.attention.d_head is 6"),
        Outside({"decoder.feed_forward.d_ff": 30}, "decoder.feed_forward.d_ff is 30"),
        Outside({"n_kv_heads": 1}, "attention.n_kv_heads is 1"),
        Outside({"encoder.positions.kind": "none"}, "encoder.positions.kind is none"),
        Outside({"decoder.positions": {"kind": "rotary", "max_positions": 9}}, "decoder.positions.kind is rotary"),
        Outside({"encoder.norm.kind": "layer"}, "encoder.norm.kind is layer"),
        Outside({"decoder.norm.eps": 1e-5}, "decoder.norm.eps is 1e-05"),
        Outside({"encoder.input_norm": True}, "encoder.input_norm is true"),
        Outside({"decoder.final_norm": False}, "decoder.final_norm is false"),
        Outside({"decoder.attention.bias": True}, "decoder.attention.bias is true"),
        Outside({"encoder.attention.scaled": True}, "encoder.attention.scaled is true"),
        Outside({"encoder.feed_forward.bias": True}, "encoder.feed_forward.bias is true"),
        Outside({"decoder.feed_forward.gated": True}, "decoder.feed_forward.gated is true"),
        Outside({"encoder.causal": True}, "encoder.causal is true"),
        Outside({"decoder.attention.window": 4}, "decoder.attention.window is 4"),
        Outside({"token_types": 2}, "embedding.token_types is 2"),
        Outside({"embedding.scaled": True}, "embedding.scaled is true"),
        Outside({"head.language.bias": True}, "head.language.bias is true"),
        Outside({"head.language.transform": "gelu"}, "head.language.transform is gelu"),
        Outside({"head.pooler": {"token": "first"}}, "head.pooler is set"),
        Outside({"head.pooler.token": "first"}, "head.pooler.token is first", "T5ForSequenceClassification"),
        Outside({"head.classifier.bias": False}, "head.classifier.bias is false", "T5ForSequenceClassification"),
        Outside({"head.language": {"tied": True}}, "head.language is set", "T5EncoderModel"),
        Outside({"dropout.attention": 0.5}, "dropout.attention is 0.5"),
        Outside({"tokens.decoder_start": None}, "tokens.decoder_start is none"),
        Outside({"encoder": None, "decoder.cross_attention": False}, "there is no encoder", fits=False),
    )


class TestMT5(FamilyContract):
    variants = (
        Variant("MT5ForConditionalGeneration", GATED, "untied", untied=True),
        Variant("MT5ForConditionalGeneration", {**GATED, "feed_forward_proj": "relu"}, "tied"),
        Variant("MT5Model", GATED),
        Variant("MT5EncoderModel", GATED),
        Variant("MT5ForSequenceClassification", GATED),
        Variant("MT5ForTokenClassification", GATED),
    )
    outside = (Outside({"head.language.scaled": True}, "head.language.scaled is true"),)


def test_missing_keys_mean_what_the_stock_classes_make_of_them() -> None:
    for name, config in (("t5", transformers.T5Config()), ("mt5", transformers.MT5Config())):
        stock = read_config({**config.to_dict(), "architectures": None})
        assert read_config({"model_type": name}) == stock


@pytest.mark.parametrize("name", ["t5-small", "t5-3b", "flan-t5-base", "mt5-small"])
def test_every_preset_fits_its_family(name: str) -> None:
    preset = lathe.preset(name)
    assert objections(preset) == []
    assert read_config(write_config(preset)) == preset


# As the published files have them, keys that nothing reads included.
PUBLISHED: dict[str, dict[str, Any]] = {
    "t5-small": {
        "architectures": [LM],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_heads": 8,
        "num_layers": 6,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
        "vocab_size": 32128,
    },
    "flan-t5-small": {
        "architectures": [LM],
        "d_ff": 1024,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": 8,
        "num_heads": 6,
        "num_layers": 8,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.23.1",
        "use_cache": True,
        "vocab_size": 32128,
    },
    "mt5-base": {
        "architectures": ["MT5ForConditionalGeneration"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 768,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "mt5",
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_layers": 12,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "tokenizer_class": "T5Tokenizer",
        "vocab_size": 250112,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name: str) -> None:
    assert read_config(PUBLISHED[name]) == lathe.preset(name)


def test_the_scale_follows_the_tie_unless_it_has_a_key_of_its_own() -> None:
    def head(**keys: object) -> tuple[bool, bool]:
        language = read_config({"model_type": "t5", **keys}).head.language
        assert language is not None
        return language.tied, language.scaled

    assert head() == (True, True)
    assert head(tie_word_embeddings=False) == (False, False)
    assert head(tie_word_embeddings=True, scale_decoder_outputs=False) == (True, False)
    assert head(tie_word_embeddings=False, scale_decoder_outputs=True) == (False, True)
    assert head(model_type="mt5") == (True, False)


def test_a_file_of_the_first_release_is_read() -> None:
    """t5-small's: copies of the table under both stacks, and a bias in cross-attention that nothing reads."""
    config = transformers.T5Config(**SMALL)
    model = transformers.T5ForConditionalGeneration(config)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    reader = read({**config.to_dict(), "architectures": [LM]}, {**tensors, bias: torch.zeros(8, 3)})
    assert torch.equal(reader.tensor("embedding.tokens.weight"), tensors["shared.weight"])
    assert reader.left_out == []


def test_stacks_with_a_table_each_are_refused() -> None:
    config = transformers.T5Config(**SMALL)
    tensors = dict(transformers.T5ForConditionalGeneration(config).state_dict())
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    with pytest.raises(RequestError, match=r"'shared\.weight' and 'decoder\.embed_tokens\.weight' differ"):
        read({**config.to_dict(), "architectures": [LM]}, tensors)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"feed_forward_proj": "gated-cube"}, "feed_forward_proj='cube'"),
        ({"feed_forward_proj": "double-gelu"}, "feed_forward_proj='double-gelu'"),
        ({"feed_forward_proj": 3}, "feed_forward_proj=3"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder=True"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"d_kv": "wide"}, "d_kv='wide'"),
        ({"num_decoder_layers": -1}, "num_decoder_layers=-1"),
        ({"relative_attention_num_buckets": 3}, "n_buckets=3"),
        ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets=0"),
        ({"relative_attention_num_buckets": 32, "relative_attention_max_distance": 16}, "max_distance=16"),
        ({"dropout_rate": 1.5}, "1.5"),
        ({"layer_norm_epsilon": "small"}, "'small'"),
        ({"tie_word_embeddings": "yes"}, "'yes'"),
        ({"pad_token_id": 99999}, "99999"),
        ({"eos_token_id": "end"}, "'end'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_that_names_it(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        read_config({"model_type": "t5", **keys})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
