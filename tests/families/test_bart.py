"""BART and mBART against their twins in `transformers`, and what their published files look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lathe
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from tests.families.contract import FamilyContract, Outside, Twin, Variant, read, read_json

# Three heads in one stack and two in the other; the stacks differ in depth and inner width too.
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 18,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 26,
    "decoder_ffn_dim": 22,
    "max_position_embeddings": 24,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "activation_dropout": 0.3,
    "classifier_dropout": 0.4,
    "forced_eos_token_id": None,
}
SHALLOW = {**SMALL, "encoder_layers": 1, "decoder_layers": 1}
UNTIED = {**SHALLOW, "tie_word_embeddings": False}
LM, MLM = "BartForConditionalGeneration", "MBartForConditionalGeneration"
ACTIVATIONS = ("relu", "gelu_new", "silu", "quick_gelu", "tanh")


class _Contract(FamilyContract):
    @classmethod
    def finish(cls, model: Any, variant: Variant) -> None:
        """Give the logits' bias values, and a model that ties nothing the same table in both stacks."""
        body = getattr(model, "model", model)
        with torch.no_grad():
            for stack in (body.encoder, body.decoder):
                stack.embed_tokens.weight.copy_(body.shared.weight)
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_(std=0.5)

    @classmethod
    def table_gradient(cls, model: Any) -> Tensor:
        body = getattr(model, "model", model)
        tables = {id(table): table for table in (body.encoder.embed_tokens.weight, body.decoder.embed_tokens.weight)}
        return torch.stack([table.grad for table in tables.values()]).sum(0)


class TestBart(_Contract):
    variants = (
        Variant(LM, SMALL),
        Variant(LM, UNTIED, "untied", untied=True),
        Variant(LM, {**SHALLOW, "scale_embedding": True, "encoder_attention_heads": 9}, "scaled"),
        *(Variant(LM, {**SHALLOW, "activation_function": name}, name) for name in ACTIVATIONS),
        Variant("BartModel", SMALL),
        Variant("BartForSequenceClassification", {**SMALL, "num_labels": 5}),
    )
    outside = (
        Outside({"d_model": 24}, "encoder.n_heads · d_head is 18 and d_model is 24"),
        Outside({"d_model": 16}, "decoder.n_heads · d_head is 18 and d_model is 16"),
        Outside({"decoder.attention.d_head": 4}, "decoder.n_heads · d_head is 8"),
        Outside({"norm_position": "pre"}, "encoder.norm_position is pre"),
        Outside({"encoder.final_norm": True}, "encoder.final_norm is true"),
        Outside({"decoder.input_norm": False}, "decoder.input_norm is false"),
        Outside({"eps": 1e-6}, "encoder.norm.eps is 1e-06"),
        Outside({"encoder.norm": {"kind": "rms"}}, "encoder.norm.kind is rms"),
        Outside({"decoder.norm.bias": False}, "decoder.norm.bias is false"),
        Outside({"d_embed": 8}, "embedding.d_embed is 8"),
        Outside({"sharing": "all"}, "encoder.sharing is all"),
        Outside({"decoder.attention.n_kv_heads": 1}, "decoder.attention.n_kv_heads is 1"),
        Outside({"encoder.attention.bias": False}, "encoder.attention.bias is false"),
        Outside({"decoder.attention.output_bias": False}, "decoder.attention.output_bias is false"),
        Outside({"decoder.attention.window": 3}, "decoder.attention.window is 3"),
        Outside({"encoder.attention.scaled": False}, "encoder.attention.scaled is false"),
        Outside({"encoder.feed_forward.gated": True}, "encoder.feed_forward.gated is true"),
        Outside({"decoder.feed_forward.bias": False}, "decoder.feed_forward.bias is false"),
        Outside({"decoder.feed_forward.activation": "relu"}, "decoder.feed_forward.activation is relu"),
        Outside({"encoder.positions.kind": "sinusoidal"}, "encoder.positions.kind is sinusoidal"),
        Outside({"encoder.positions": {"kind": "relative"}}, "encoder.positions.kind is relative"),
        Outside({"decoder.positions.offset": 0}, "decoder.positions.offset is 0"),
        Outside({"decoder.positions.max_positions": 30}, "decoder.positions.max_positions is 30"),
        Outside({"token_types": 2}, "embedding.token_types is 2"),
        Outside({"encoder.causal": True}, "encoder.causal is true"),
        Outside({"head.language.bias": True}, "head.language.bias is true"),
        Outside({"head.language.offset": False}, "head.language.offset is false"),
        Outside({"head.language.scaled": True}, "head.language.scaled is true"),
        Outside({"head.language.transform": "gelu"}, "head.language.transform is gelu"),
        Outside({"head.pooler": {"token": "first"}}, "head.pooler is set"),
        Outside({"head.pooler.activation": None}, "head.pooler.activation is none", "BartForSequenceClassification"),
        Outside({"dropout.embedding": 0.0}, "dropout.embedding is 0.0"),
        Outside({"dropout.output": 0.1}, "dropout.output is 0.1"),
        Outside({"decoder": None}, "no encoder or no decoder", fits=False),
        Outside({"encoder": None, "decoder.cross_attention": False}, "no encoder or no decoder", fits=False),
    )


class TestMBart(_Contract):
    def inputs(self, twin: Twin, padding: str = "none") -> dict[str, Tensor]:
        batch = super().inputs(twin, padding)
        if padding == "left" and "decoder_input_ids" not in batch:
            # Where the stock class looks for the last token of a row, it counts the tokens from the row's start,
            # and so misses it behind pads on the left. Lathe finds it; given decoder ids, the two agree again.
            batch["decoder_input_ids"] = twin.ours.shift_right(batch["input_ids"])
        return batch

    variants = (
        Variant(MLM, {**SMALL, "scale_embedding": True, "decoder_start_token_id": 7}, "scaled"),
        Variant(MLM, {**UNTIED, "decoder_start_token_id": 7}, "untied", untied=True),
        Variant("MBartModel", SMALL),
        Variant("MBartForSequenceClassification", SMALL),
    )
    outside = (
        Outside({"norm_position": "post"}, "encoder.norm_position is post"),
        Outside({"decoder.final_norm": False}, "decoder.final_norm is false"),
        Outside({"tokens.decoder_start": 2}, "tokens.decoder_start is 2"),
    )


def test_missing_keys_mean_what_the_stock_classes_make_of_them() -> None:
    for name, config in (("bart", transformers.BartConfig()), ("mbart", transformers.MBartConfig())):
        stock = read_config({**config.to_dict(), "architectures": None})
        assert read_config({"model_type": name}) == stock
    assert _labels("bart") == 3
    assert _labels("mbart") == 2


def _labels(model_type: str, **keys: object) -> int:
    kind = {"bart": "BartForSequenceClassification", "mbart": "MBartForSequenceClassification"}[model_type]
    classifier = read_config({"model_type": model_type, "architectures": [kind], **keys}).head.classifier
    assert classifier is not None
    return classifier.n_labels


@pytest.mark.parametrize("name", ["bart-base", "bart-large", "mbart-large-cc25", "mbart-large-50"])
def test_every_preset_fits_its_family(name: str) -> None:
    preset = lathe.preset(name)
    assert objections(preset) == []
    back = read_config(write_config(preset))
    assert back == preset.with_({"tokens.mask": None})


# As the published files have them, keys that nothing reads included.
COMMON: dict[str, Any] = {
    "activation_function": "gelu",
    "add_bias_logits": False,
    "bos_token_id": 0,
    "classifier_dropout": 0.0,
    "dropout": 0.1,
    "eos_token_id": 2,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "pad_token_id": 1,
    "use_cache": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "bart-base": {
        **COMMON,
        "activation_dropout": 0.1,
        "add_final_layer_norm": False,
        "architectures": ["BartModel"],
        "attention_dropout": 0.1,
        "classif_dropout": 0.1,
        "d_model": 768,
        "decoder_attention_heads": 12,
        "decoder_ffn_dim": 3072,
        "decoder_layerdrop": 0.0,
        "decoder_layers": 6,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "encoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "encoder_layerdrop": 0.0,
        "encoder_layers": 6,
        "forced_eos_token_id": 2,
        "gradient_checkpointing": False,
        "model_type": "bart",
        "no_repeat_ngram_size": 3,
        "normalize_before": False,
        "normalize_embedding": True,
        "num_beams": 4,
        "num_hidden_layers": 6,
        "scale_embedding": False,
        "vocab_size": 50265,
    },
    "mbart-large-cc25": {
        **COMMON,
        "activation_dropout": 0.0,
        "add_final_layer_norm": True,
        "architectures": ["MBartForConditionalGeneration"],
        "attention_dropout": 0.0,
        "d_model": 1024,
        "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096,
        "decoder_layerdrop": 0.0,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "encoder_layerdrop": 0.0,
        "encoder_layers": 12,
        "model_type": "mbart",
        "normalize_before": True,
        "normalize_embedding": True,
        "num_hidden_layers": 12,
        "scale_embedding": True,
        "static_position_embeddings": False,
        "vocab_size": 250027,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name: str) -> None:
    config = PUBLISHED[name]
    head = "none" if config["architectures"] == ["BartModel"] else None
    assert read_config(config) == lathe.preset(name, head=head).with_({"tokens.mask": None})


def test_a_file_of_the_base_class_is_read_under_either_name() -> None:
    """bart-base's config names BartModel, and its file holds the head's bias and two version counters beside it."""
    config = transformers.BartConfig(**SMALL)
    model = transformers.BartModel(config)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    extra = {"model.encoder.version": torch.zeros(1), "model.decoder.version": torch.zeros(1)}
    stored = {**tensors, **extra, "final_logits_bias": torch.zeros(1, 61)}
    reader = read({**config.to_dict(), "architectures": ["BartModel"]}, stored)
    assert reader.left_out == ["final_logits_bias"]
    assert torch.equal(reader.tensor("embedding.tokens.weight"), model.shared.weight)


def test_tokens_of_generation_are_taken_from_a_config_that_holds_them(tmp_path: Path) -> None:
    """As in directories from before the settings had a file of their own."""
    settings = {**SHALLOW, "decoder_start_token_id": 7, "forced_bos_token_id": 9, "forced_eos_token_id": 2}
    twin = TestMBart().make_twin(Variant(MLM, settings), tmp_path / "old")
    config = {**read_json(tmp_path / "old" / "config.json"), "forced_bos_token_id": 9}
    (tmp_path / "old" / "generation_config.json").unlink()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = torch.tensor([[5, 6, 2]])
    got = lathe.load(tmp_path / "old").generate(ids, max_new_tokens=6)
    start = {"decoder_start_token_id": 7, "forced_bos_token_id": 9, "forced_eos_token_id": 2}
    assert torch.equal(got, twin.theirs.generate(ids, max_new_tokens=6, use_cache=False, **start))
    assert got[0, :2].tolist() == [7, 9]


@pytest.mark.parametrize("saved_again", [False, True])
def test_settings_of_generation_are_taken_from_a_config_that_holds_them(tmp_path: Path, saved_again: bool) -> None:
    """As bart-large-cnn's does; what is saved of it says the same to `transformers`."""
    TestMBart().make_twin(Variant(MLM, SHALLOW), tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    held = {"max_length": 12, "min_length": 7, "num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 2.0}
    config = {**read_json(tmp_path / "old" / "config.json"), **held, "early_stopping": True, "suppress_tokens": [5, 9]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = torch.tensor([[5, 6, 2], [11, 4, 2]])
    stock = transformers.AutoModelForSeq2SeqLM
    expected = stock.from_pretrained(tmp_path / "old").generate(ids)
    assert expected.shape[1] > 5
    model = lathe.load(tmp_path / "old")
    if saved_again:
        model.save(tmp_path / "new")
        assert torch.equal(stock.from_pretrained(tmp_path / "new").generate(ids), expected)
        model = lathe.load(tmp_path / "new")
    assert torch.equal(model.generate(ids), expected)


def test_a_model_with_a_table_for_each_stack_is_refused() -> None:
    config = transformers.BartConfig(**UNTIED)
    model = transformers.BartForConditionalGeneration(config)
    with pytest.raises(
        RequestError, match=r"'model\.shared\.weight' and 'model\.encoder\.embed_tokens\.weight' differ"
    ):
        lathe.load(model)


def test_an_untied_file_of_transformers_4_is_read() -> None:
    """It stores the table once, because its copies shared their memory."""
    config = transformers.BartConfig(**UNTIED)
    tensors = dict(transformers.BartForConditionalGeneration(config).state_dict())
    for stack in ("encoder", "decoder"):
        del tensors[f"model.{stack}.embed_tokens.weight"]
    reader = read({**config.to_dict(), "architectures": [LM]}, tensors)
    assert torch.equal(reader.tensor("embedding.tokens.weight"), tensors["model.shared.weight"])
    assert torch.equal(reader.tensor("head.language.output.weight"), tensors["lm_head.weight"])


def test_a_depth_changed_after_loading_is_the_depth_the_stock_class_builds() -> None:
    """Stock configs carry num_hidden_layers beside encoder_layers, and the former wins."""
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL))
    config = {**model.config.to_dict(), "num_hidden_layers": 2}
    smaller = read_config({**config, "architectures": [LM]}).with_(n_layers=1)
    stock = transformers.BartConfig.from_dict({**config, **write_config(smaller)})
    assert (stock.encoder_layers, stock.decoder_layers) == (1, 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"encoder_attention_heads": 15}, "encoder_attention_heads=15"),
        ({"decoder_attention_heads": 0}, "decoder_attention_heads=0"),
        ({"d_model": "wide"}, "d_model='wide'"),
        ({"encoder_layers": -1}, "encoder_layers=-1"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"activation_function": "cube"}, "activation_function='cube'"),
        ({"activation_dropout": 2}, "2"),
        ({"scale_embedding": "yes"}, "'yes'"),
        ({"eos_token_id": 50265}, "50265"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ],
)
@pytest.mark.parametrize("model_type", ["bart", "mbart"])
def test_a_setting_that_cannot_be_is_one_line_that_names_it(model_type: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        read_config({"model_type": model_type, **keys})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
