"""Llama, Mistral and Qwen2 against their twins in `transformers`, and what their published files look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.architecture import Attention, Positions
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from tests.families.contract import FamilyContract, Outside, Variant, randomise, read

# Three heads share one key-value head, and are narrower together than the model.
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
# Without a head_dim, heads take the width between them.
WHOLE = {**{key: value for key, value in SMALL.items() if key != "head_dim"}, "num_attention_heads": 6}
ACTIVATIONS = ("relu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "tanh")


def head_classes(stem: str) -> tuple[Variant, ...]:
    """The twins of a family's classes without a language head."""
    return (
        Variant(f"{stem}Model", SMALL),
        Variant(f"{stem}ForSequenceClassification", {**SMALL, "num_labels": 3}),
    )


class TestLlama(FamilyContract):
    variants = (
        Variant("LlamaForCausalLM", SMALL, "grouped"),
        Variant("LlamaForCausalLM", {**WHOLE, "num_key_value_heads": 3}, "two-to-a-group"),
        Variant("LlamaForCausalLM", {**WHOLE, "num_key_value_heads": None, "rms_norm_eps": 0.1}, "ungrouped"),
        Variant("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}, "tied"),
        Variant("LlamaForCausalLM", {**SMALL, "attention_bias": True}, "attention-bias"),
        Variant("LlamaForCausalLM", {**SMALL, "mlp_bias": True, "head_dim": 10}, "mlp-bias-wide-heads"),
        Variant("LlamaForCausalLM", {**SMALL, "rope_parameters": LLAMA3, "eos_token_id": [2, 3]}, "llama3"),
        Variant("LlamaForCausalLM", {**SMALL, "rope_parameters": LINEAR}, "linear"),
        *(Variant("LlamaForCausalLM", {**SMALL, "num_hidden_layers": 1, "hidden_act": n}, n) for n in ACTIVATIONS),
        *head_classes("Llama"),
    )
    outside = (
        Outside({"decoder.attention.output_bias": True, "decoder.feed_forward.bias": True}, "output_bias is true"),
        Outside({"decoder.norm_position": "post"}, "decoder.norm_position is post"),
        Outside({"decoder.norm": {"kind": "layer"}}, "decoder.norm.kind is layer"),
        Outside({"decoder.final_norm": False}, "decoder.final_norm is false"),
        Outside({"decoder.input_norm": True}, "decoder.input_norm is true"),
        Outside({"gated": False}, "decoder.feed_forward.gated is false"),
        Outside({"decoder.attention.scaled": False}, "decoder.attention.scaled is false"),
        Outside({"decoder.causal": False}, "decoder.causal is false"),
        Outside({"sharing": "attention"}, "decoder.sharing is attention"),
        Outside({"d_embed": 8}, "embedding.d_embed is 8"),
        Outside({"embedding.scaled": True}, "embedding.scaled is true"),
        Outside({"token_types": 2}, "embedding.token_types is 2"),
        Outside({"head.language.bias": True}, "head.language.bias is true"),
        Outside({"head.language.scaled": True}, "head.language.scaled is true"),
        Outside({"head.pooler.token": "first"}, "head.pooler.token is first", "LlamaForSequenceClassification"),
        Outside({"head.classifier.bias": True}, "head.classifier.bias is true", "LlamaForSequenceClassification"),
        Outside({"dropout.hidden": 0.5}, "dropout.hidden is 0.5"),
        Outside({"decoder.positions.kind": "learned"}, "its positions are learned", fits=False),
        # What a sister family holds becomes one of hers.
        Outside({"d_model": 20}, "d_model is 20 and no multiple of n_heads, 3"),
        Outside({"window": 4}, "decoder.attention.window is 4"),
        Outside({"decoder.attention.bias": True}, "decoder.attention.output_bias is false"),
        # And what none of them holds is changed: here to the next number of heads that divides.
        Outside({"d_model": 20, "decoder.feed_forward.bias": True}, "d_model is 20 and no multiple of n_heads, 3"),
        Outside({"d_model": 22, "n_heads": 4, "n_kv_heads": 4, "gated": False}, "no multiple of n_heads, 4"),
    )


class TestMistral(FamilyContract):
    variants = (
        Variant("MistralForCausalLM", {**SMALL, "sliding_window": 4}, "window"),
        Variant("MistralForCausalLM", {**SMALL, "sliding_window": None, "hidden_size": 20}, "no-window-odd-width"),
        Variant("MistralForCausalLM", {**SMALL, "sliding_window": 1, "tie_word_embeddings": True}, "narrowest-tied"),
        Variant("MistralForCausalLM", {**WHOLE, "num_key_value_heads": 6, "rope_parameters": LINEAR}, "wide-window"),
        *head_classes("Mistral"),
    )
    outside = (
        Outside({"decoder.norm_position": "post"}, "decoder.norm_position is post"),
        Outside({"decoder.feed_forward.bias": True}, "decoder.feed_forward.bias is true"),
        Outside({"decoder.attention.bias": True, "window": None}, "decoder.attention.bias is true"),
    )


class TestQwen2(FamilyContract):
    variants = (
        Variant("Qwen2ForCausalLM", WHOLE, "full"),
        Variant("Qwen2ForCausalLM", {**SMALL, "hidden_size": 20, "tie_word_embeddings": True}, "odd-width-tied"),
        Variant(
            "Qwen2ForCausalLM",
            {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
            "window",
        ),
        Variant("Qwen2ForCausalLM", {**SMALL, "use_sliding_window": True, "max_window_layers": 2}, "window-unused"),
        Variant("Qwen2ForCausalLM", {**SMALL, "rope_parameters": LLAMA3}, "llama3"),
        *head_classes("Qwen2"),
    )
    outside = (
        Outside({"decoder.norm_position": "post"}, "decoder.norm_position is post"),
        Outside({"decoder.attention.bias": False}, "decoder.attention.bias is false"),
        Outside({"decoder.attention.output_bias": True}, "decoder.attention.output_bias is true"),
    )


def attention_of(architecture: lathe.Architecture) -> Attention:
    """The decoder's attention."""
    assert architecture.decoder is not None
    return architecture.decoder.attention


def attention(**keys: Any) -> Attention:
    """The attention of a config; a Llama's unless `model_type` says another."""
    return attention_of(read_config({"model_type": "llama", **keys}))


def rotary(**keys: Any) -> Positions:
    """The positions of a Llama config."""
    decoder = read_config({"model_type": "llama", **keys}).decoder
    assert decoder is not None
    return decoder.positions


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_missing_keys_mean_what_the_stock_class_makes_of_them(name: str) -> None:
    config = transformers.AutoConfig.for_model(name)
    assert read_config({"model_type": name}) == read_config(config.to_dict())


def test_a_negative_padding_id_is_none() -> None:
    """As the first conversions wrote it."""
    assert read_config({**SMALL, "model_type": "llama", "pad_token_id": -1}).tokens.pad is None


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-405b", "mistral-7b", "qwen2-0.5b", "qwen2-7b"])
def test_every_preset_fits_its_family(name: str) -> None:
    preset = lathe.preset(name)
    assert objections(preset) == []
    back = read_config(write_config(preset))
    assert back.with_(n_kv_heads=attention_of(back).kv_heads) == preset


@pytest.mark.parametrize("width", [3000, 4095])
def test_a_width_that_a_stock_llama_refuses_is_a_mistral_that_computes_the_same(width: int) -> None:
    preset = lathe.preset("llama-2-7b").with_(d_model=width)
    (objection,) = objections(preset)
    assert objection.changes == {"family": "mistral"}
    stock = transformers.MistralConfig.from_dict(write_config(preset.with_(objection.changes)))
    assert (stock.hidden_size, stock.head_dim, stock.sliding_window) == (width, 128, None)
    keys = {"hidden_size": width, "num_attention_heads": 32, "head_dim": 128}
    with pytest.raises(Exception, match="not a multiple"):
        transformers.LlamaConfig(**keys)


def test_rotary_settings_are_read_in_both_releases_forms() -> None:
    """`rope_theta` beside `rope_scaling` in transformers 4, `rope_parameters` in 5."""
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    older, newer = rotary(rope_theta=50.0, rope_scaling=scaling), rotary(rope_parameters=LLAMA3)
    assert older == newer
    assert older.theta == 50.0
    assert older.scaling is not None
    assert (older.scaling.kind, older.scaling.factor, older.scaling.original_max_positions) == ("llama3", 4.0, 16)
    assert rotary(rope_scaling={"type": "linear", "factor": 2.0}) == rotary(rope_scaling=LINEAR | {"rope_theta": 1e4})
    assert rotary(rope_scaling=None, rope_theta=7.0) == rotary(rope_parameters={"rope_theta": 7.0})
    # Without a length of its own, the scaling starts from the model's.
    del scaling["original_max_position_embeddings"]
    bare = rotary(rope_scaling=scaling, max_position_embeddings=99).scaling
    assert bare is not None
    assert bare.original_max_positions == 99


def test_a_missing_number_of_key_value_heads_is_the_stock_default_and_a_null_is_the_number_of_heads() -> None:
    assert attention(model_type="mistral").kv_heads == 8
    assert attention(model_type="mistral", num_key_value_heads=None).kv_heads == 32
    assert attention(model_type="llama", num_attention_heads=16).kv_heads == 16
    with pytest.raises(RequestError, match="n_kv_heads=32"):
        attention(model_type="qwen2", num_attention_heads=16)


def test_a_window_stands_where_the_flags_say() -> None:
    def window(name: str, **keys: Any) -> int | None:
        return attention(model_type=name, num_hidden_layers=4, **keys).window

    assert window("llama", sliding_window=8) is None
    assert window("mistral") == 4096
    assert window("mistral", sliding_window=None) is None
    assert window("qwen2", sliding_window=8) is None
    assert window("qwen2", sliding_window=8, use_sliding_window=True) is None  # from layer 28 on
    assert window("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=0) == 8
    assert window("qwen2", layer_types=["full_attention"] * 4) is None
    sliding = ["sliding_attention"] * 4
    assert window("qwen2", sliding_window=8, use_sliding_window=True, layer_types=sliding) == 8


def test_the_published_files_of_llama_2_are_read() -> None:
    """They hold each layer's rotary frequencies, and Mistral's may name the number of slices of a product."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    randomise(model)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    reader = read({"model_type": "llama", "pretraining_tp": 2, "rope_scaling": None, **SMALL}, tensors)
    assert reader.left_out == []
    assert torch.equal(reader.tensor("decoder.attention.1.o.weight"), tensors["model.layers.1.self_attn.o_proj.weight"])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_scaling": "linear"}, "rotary settings are 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of fields"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two'"),
        ({"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ({"rope_theta": 0}, "theta=0"),
        ({"rope_theta": -5.0}, "theta=-5.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_size": 100, "head_dim": 4}, "hidden_size=100 and num_attention_heads=32"),
        ({"model_type": "qwen2", "hidden_size": 100}, "hidden_size=100 and num_attention_heads=32"),
        ({"hidden_size": 96, "num_attention_heads": 32}, "d_head=3"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "n_kv_heads=5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"intermediate_size": "wide"}, "intermediate_size='wide'"),
        ({"hidden_act": "cube"}, "hidden_act='cube'"),
        ({"rms_norm_eps": "small"}, "eps='small'"),
        ({"attention_bias": "yes"}, "'yes'"),
        ({"mlp_bias": 3}, "3"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
            "the layers are full_attention, sliding_attention",
        ),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32}, "the layers are chunked_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "no window is set"),
        ({"model_type": "qwen2", "layer_types": "full_attention"}, "layer_types='full_attention'"),
        ({"model_type": "qwen2", "layer_types": [["full_attention"]] * 32}, "the layers are ['full_attention']"),
        ({"model_type": "qwen2", "layer_types": []}, "the layers are none at all"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "unknown class 'LlamaForQuestionAnswering'"),
    ],
)
def test_what_cannot_be_computed_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        read_config({"model_type": "llama", **keys})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"decoder.positions.theta": 500.0}, {"decoder.positions.scaling": None}], ids=["theta", "scaling"]
)
def test_other_rotary_settings_are_not_undone_by_the_config_that_came_with_them(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(vocab_size=40, rope_parameters=scaling, **sizes)
    theirs = transformers.LlamaForCausalLM(config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "stock")
    came = lathe.load(tmp_path / "stock")
    model = lathe.Model(came.architecture.with_(changes), came.tensors(), config=came.config)
    model.save(tmp_path / "out")
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(model(ids).logits, stock, atol=1e-5, rtol=1e-5)
        assert float((stock - came(ids).logits).abs().max()) > 1e-3
