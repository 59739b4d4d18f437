"""GPT-2 against its twins in `transformers`, and what its published files look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from tests.families.contract import FamilyContract, Outside, Variant, randomise, read

# Three heads of four; a feed-forward that is not four times the width.
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "n_embd": 12,
    "n_head": 3,
    "n_layer": 2,
    "n_inner": 20,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LM = "GPT2LMHeadModel"
ACTIVATIONS = ("relu", "gelu", "silu", "quick_gelu", "tanh")


class TestGPT2(FamilyContract):
    variants = (
        Variant(LM, SMALL, "tied"),
        Variant(LM, {**SMALL, "tie_word_embeddings": False, "n_head": 1}, "untied-one-head"),
        Variant(LM, {**SMALL, "n_inner": None, "n_embd": 15, "n_head": 5}, "odd-width"),
        Variant(LM, {**SMALL, "n_head": 12, "layer_norm_epsilon": 0.1}, "heads-of-one"),
        Variant(LM, {**SMALL, "scale_attn_weights": False, "n_layer": 1}, "unscaled"),
        Variant(LM, {**SMALL, "pad_token_id": None, "eos_token_id": [2, 3]}, "no-pad-two-ends"),
        *(Variant(LM, {**SMALL, "n_layer": 1, "activation_function": name}, name) for name in ACTIVATIONS),
        Variant("GPT2Model", SMALL),
        Variant("GPT2ForSequenceClassification", {**SMALL, "num_labels": 5}),
        Variant("GPT2ForSequenceClassification", {**SMALL, "num_labels": 2, "resid_pdrop": 0.0}, "two-labels"),
    )
    outside = (
        Outside({"decoder.norm_position": "post"}, "decoder.norm_position is post"),
        Outside({"d_model": 16}, "n_heads · d_head is 12 and d_model is 16"),
        Outside({"d_model": 14}, "n_heads · d_head is 12 and d_model is 14"),
        Outside({"d_model": 14, "n_kv_heads": 1}, "3 query heads share 1"),
        Outside({"n_kv_heads": 1}, "3 query heads share 1"),
        Outside({"d_embed": 8}, "embedding.d_embed is 8"),
        Outside({"sharing": "all"}, "decoder.sharing is all"),
        Outside({"token_types": 2}, "embedding.token_types is 2"),
        Outside({"embedding.scaled": True}, "embedding.scaled is true"),
        Outside({"decoder.norm.kind": "rms"}, "decoder.norm.kind is rms"),
        Outside({"decoder.norm.bias": False}, "decoder.norm.bias is false"),
        Outside({"decoder.input_norm": True}, "decoder.input_norm is true"),
        Outside({"decoder.final_norm": False}, "decoder.final_norm is false"),
        Outside({"decoder.attention.bias": False}, "decoder.attention.bias is false"),
        Outside({"decoder.attention.output_bias": False}, "decoder.attention.output_bias is false"),
        Outside({"window": 4}, "decoder.attention.window is 4"),
        Outside({"decoder.feed_forward.bias": False}, "decoder.feed_forward.bias is false"),
        Outside({"gated": True}, "decoder.feed_forward.gated is true"),
        Outside({"decoder.causal": False}, "decoder.causal is false"),
        Outside({"decoder.positions.offset": 2}, "decoder.positions.offset is 2"),
        Outside({"decoder.positions.kind": "sinusoidal"}, "its positions are sinusoidal", fits=False),
        Outside({"head.language.bias": True}, "head.language.bias is true"),
        Outside({"head.language.transform": "gelu"}, "head.language.transform is gelu"),
        Outside({"head.pooler": {"token": "last"}}, "head.pooler is set"),
        Outside({"head.pooler.token": "first"}, "head.pooler.token is first", "GPT2ForSequenceClassification"),
        Outside({"head.classifier.bias": True}, "head.classifier.bias is true", "GPT2ForSequenceClassification"),
        Outside({"dropout.activation": 0.5}, "dropout.activation is 0.5"),
    )

    def field_pairs(self, theirs: Any) -> Iterable[tuple[str, str]]:
        """Leave out the stock class's `cross_attentions`, which it returns empty."""
        return [(name, ours) for name, ours in super().field_pairs(theirs) if name != "cross_attentions"]


def test_an_encoder_is_refused() -> None:
    both = lathe.preset("t5-small").with_(family="gpt2")
    assert [each.reason for each in objections(both)] == [
        "it has an encoder and decoder, and a gpt2 is a decoder alone"
    ]


def test_missing_keys_mean_what_the_stock_class_makes_of_them() -> None:
    stock = read_config({**transformers.GPT2Config().to_dict(), "architectures": None})
    assert read_config({"model_type": "gpt2"}) == stock


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "gpt2-xl"])
def test_every_preset_fits_its_family(name: str) -> None:
    preset = lathe.preset(name)
    assert objections(preset) == []
    assert read_config(write_config(preset)) == preset


def test_the_published_file_is_read() -> None:
    """gpt2's: names without a prefix, and each layer's causal mask beside its weights."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL))
    randomise(model)
    tensors = {name.removeprefix("transformer."): t.detach() for name, t in model.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril()[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    config = {"model_type": "gpt2", "architectures": [LM], "n_ctx": 24, "summary_type": "cls_index", **SMALL}
    reader = read(config, tensors)
    assert reader.left_out == []
    query = reader.tensor("decoder.attention.1.q.weight")
    assert torch.equal(query, tensors["h.1.attn.c_attn.weight"][:, :12].t())


def test_the_names_of_other_families_are_read() -> None:
    synonyms = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 16}
    stock = transformers.GPT2Config(**synonyms)
    assert read_config({"model_type": "gpt2", **synonyms}) == read_config(stock.to_dict())


def test_the_stock_end_of_text_is_no_token_of_a_smaller_vocabulary() -> None:
    tokens = read_config({"model_type": "gpt2", "vocab_size": 300, "eos_token_id": 50256}).tokens
    assert (tokens.bos, tokens.eos) == (None, ())
    with pytest.raises(RequestError, match=r"tokens\.eos\[0\]=301"):
        read_config({"model_type": "gpt2", "vocab_size": 300, "eos_token_id": 301})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_head": 5}, "n_embd=768 and n_head=5"),
        ({"n_head": 0}, "n_head=0"),
        ({"n_layer": "many"}, "n_layer='many'"),
        ({"n_positions": -1}, "n_positions=-1"),
        ({"n_inner": 2.5}, "n_inner=2.5"),
        ({"activation_function": "cube"}, "activation_function='cube'"),
        ({"activation_function": ["gelu"]}, "activation_function=['gelu']"),
        ({"layer_norm_epsilon": "small"}, "eps='small'"),
        ({"resid_pdrop": 1.5}, "1.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]}"),
        ({"per_layer_config": {"0": {"n_inner": 8}}}, "per_layer_config="),
        ({"architectures": "GPT2LMHeadModel"}, "architectures='GPT2LMHeadModel'"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "unknown class 'GPT2DoubleHeadsModel'"),
    ],
)
def test_what_cannot_be_computed_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        read_config({"model_type": "gpt2", **keys})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
