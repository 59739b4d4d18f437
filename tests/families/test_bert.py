"""BERT against its twins in `transformers`, and what its published files look like."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lathe
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from lathe.presets import heads, preset
from tests.families.contract import FamilyContract, Outside, Variant, randomise, read, write_directory

# Three heads of six; three token types where most models have two.
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 26,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
}
ONE = {**SMALL, "num_hidden_layers": 1}
DEEP = {**SMALL, "num_hidden_layers": 5}
UNTIED = {**SMALL, "tie_word_embeddings": False}
LM, PAIR, LABELS = "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"
DECODER = {
    "n_layers": 1,
    "attention": {"n_heads": 3, "d_head": 6},
    "feed_forward": {"d_ff": 8},
    "causal": True,
    "cross_attention": True,
}


class TestBert(FamilyContract):
    variants = (
        Variant(LM, SMALL, "tied"),
        Variant(LM, UNTIED, "untied"),
        Variant(LM, {**ONE, "num_attention_heads": 1, "type_vocab_size": 1, "hidden_act": "relu"}, "one-head-relu"),
        Variant(LM, {**DEEP, "num_attention_heads": 9, "hidden_act": "gelu_new"}, "narrow-heads-gelu_new"),
        Variant(LM, {**ONE, "layer_norm_eps": 1e-3, "hidden_act": "silu"}, "large-eps-silu"),
        Variant("BertModel", {**SMALL, "hidden_act": "quick_gelu"}, "quick_gelu"),
        Variant(PAIR, {**SMALL, "num_labels": 5, "hidden_act": "tanh"}, "tanh"),
        Variant(PAIR, UNTIED, "untied"),
        Variant(LABELS, {**SMALL, "num_labels": 5, "hidden_act": "swish"}, "swish"),
        Variant(LABELS, {**ONE, "classifier_dropout": 0.3}, "two-labels"),
        Variant("BertForTokenClassification", {**SMALL, "num_labels": 4}),
    )
    outside = (
        Outside({"encoder.norm_position": "pre"}, "encoder.norm_position is pre"),
        Outside({"encoder.positions": {"kind": "rotary", "max_positions": 16}}, "its positions are rotary"),
        Outside({"encoder.positions": {"kind": "relative"}}, "its positions are relative"),
        Outside({"encoder.positions.kind": "none"}, "its positions are none"),
        Outside({"encoder.positions.offset": 2}, "encoder.positions.offset is 2"),
        Outside({"encoder.causal": True, "encoder.attention.window": 4}, "its encoder is causal"),
        Outside({"d_head": 4}, "n_heads · d_head is 3 · 4 = 12 and d_model is 18"),
        Outside({"d_model": 24}, "n_heads · d_head is 3 · 6 = 18 and d_model is 24"),
        Outside({"n_kv_heads": 1}, "n_kv_heads is 1 and n_heads is 3"),
        Outside({"n_kv_heads": 1, "d_model": 17}, "n_heads · d_head is 3 · 6 = 18 and d_model is 17"),
        Outside({"token_types": 0}, "it has no token types"),
        Outside({"d_embed": 8}, "its embedding is factorised (d_embed is 8)"),
        Outside({"embedding.scaled": True}, "embedding.scaled is true"),
        Outside({"sharing": "all"}, "encoder.sharing is all"),
        Outside({"sharing": "attention"}, "encoder.sharing is attention"),
        Outside({"encoder.norm.kind": "rms"}, "encoder.norm.kind is rms"),
        Outside({"encoder.norm.bias": False}, "encoder.norm.bias is false"),
        Outside({"encoder.input_norm": False}, "encoder.input_norm is false"),
        Outside({"encoder.final_norm": True}, "encoder.final_norm is true"),
        Outside({"encoder.attention.bias": False}, "encoder.attention.bias is false"),
        Outside({"encoder.attention.output_bias": False}, "encoder.attention.output_bias is false"),
        Outside({"encoder.attention.scaled": False}, "encoder.attention.scaled is false"),
        Outside({"gated": True}, "encoder.feed_forward.gated is true"),
        Outside({"encoder.feed_forward.bias": False}, "encoder.feed_forward.bias is false"),
        Outside({"head.language.transform": "relu"}, "head.language.transform is relu"),
        Outside({"head.language.transform": None}, "head.language.transform is none"),
        Outside({"head.language.bias": False}, "head.language.bias is false"),
        Outside({"head.language.scaled": True}, "head.language.scaled is true"),
        Outside({"head.language.offset": True}, "head.language.offset is true"),
        Outside({"head.pooler": {"token": "first"}}, "its head is a masked-LM head and a pooled state"),
        Outside({"head.pooler": None}, "its head is nothing", "BertModel"),
        Outside({"head.pooler.activation": "gelu"}, "the first token through a gelu layer", "BertModel"),
        Outside({"head.pooler.token": "last"}, "labels of the last token through a tanh layer", LABELS),
        Outside({"head.pooler": {"token": "each", "activation": "tanh"}}, "labels of each token through", LABELS),
        Outside({"head.classifier.bias": False}, "head.classifier.bias is false", LABELS),
        Outside({"n_labels": 3}, "head.classifier.n_labels is 3", PAIR),
        Outside({"dropout.embedding": 0.5}, "dropout.embedding is 0.5"),
        Outside({"dropout.activation": 0.5}, "dropout.activation is 0.5"),
        Outside({"dropout.output": 0.5}, "dropout.output is 0.5"),
        Outside({"decoder": DECODER}, "it has a decoder", fits=False),
    )

    @classmethod
    def finish(cls, model: Any, variant: Variant) -> None:
        """Let the untied head's two biases be equal, as Lathe writes them; see the tests of the bias below."""
        if variant.config is UNTIED:
            with torch.no_grad():
                model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)


def stock(kind: str, **config: Any) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """A stock model with random weights, its config and its tensors."""
    made = getattr(transformers, kind)
    model = made(made.config_class(**{**SMALL, **config})).eval()
    randomise(model)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return model, {**model.config.to_dict(), "architectures": [kind]}, tensors


IDS = torch.tensor([[5, 17, 40, 8], [9, 9, 50, 2]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def test_missing_keys_mean_what_the_stock_class_makes_of_them() -> None:
    config = transformers.BertConfig()
    assert read_config({"model_type": "bert"}) == read_config({**config.to_dict(), "architectures": None})


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-large-cased"])
def test_every_preset_fits_its_family(name: str) -> None:
    for head in heads(name):
        found = preset(name, head)
        if head == "none":
            assert [each.reason for each in objections(found)] == [
                (
                    "its head is nothing, and the nearest class, BertModel, has a pooled state of the first token "
                    "through a tanh layer"
                )
            ]
        else:
            assert objections(found) == []
            back = read_config(write_config(found))
            # The mask token is the tokenizer's.
            assert back.with_({"tokens.mask": found.tokens.mask}) == found


def test_a_masked_lm_of_the_first_release_is_read() -> None:
    """bert-base-uncased's file: both pretraining heads, a copy of the table, TensorFlow's names, a buffer."""
    model, config, tensors = stock(PAIR)
    for name in [name for name in tensors if "LayerNorm" in name]:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = tensors.pop(name)
    del tensors["cls.predictions.decoder.bias"]
    tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
    reader = read({**config, "architectures": [LM]}, tensors)
    assert sorted(reader.left_out) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    ]
    ours = lathe.Model(reader.architecture, {name: reader.tensor(name) for name in reader.names()})
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, model(IDS).prediction_logits, rtol=0, atol=1e-4)


def test_a_body_is_read_from_a_file_with_a_head() -> None:
    _, config, tensors = stock(LM)
    pooler = {"pooler.dense.weight": torch.ones(18, 18), "pooler.dense.bias": torch.ones(18)}
    reader = read({**config, "architectures": ["BertModel"]}, {**tensors, **pooler})
    assert torch.equal(reader.tensor("head.pooler.weight"), torch.ones(18, 18))
    assert set(reader.left_out) == {name for name in tensors if name.startswith("cls.")}


def test_the_bias_that_the_stock_class_reads_is_the_one_that_counts(tmp_path: Path) -> None:
    """transformers 5 leaves `predictions.bias` of an untied model where it was and trains `decoder.bias`."""
    model, config, tensors = stock(LM, tie_word_embeddings=False)
    first, second = "cls.predictions.bias", "cls.predictions.decoder.bias"
    assert not torch.equal(tensors[first], tensors[second])
    ours = lathe.load(write_directory(tmp_path / "in", config, tensors))
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-4)
    ours.save(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[first], tensors[second])
    assert torch.equal(written[second], tensors[second])


def test_an_untied_file_with_the_older_bias_alone_is_read(tmp_path: Path) -> None:
    """transformers 4 stores an untied head's bias under one name, which transformers 5 takes for missing."""
    _, config, tensors = stock(LM, tie_word_embeddings=False)
    bias = tensors["cls.predictions.bias"]
    del tensors["cls.predictions.decoder.bias"]
    ours = lathe.load(write_directory(tmp_path / "in", config, tensors))
    assert torch.equal(ours.tensors()["head.language.output.bias"], bias)
    ours.save(tmp_path / "out")
    again, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again.cls.predictions.decoder.bias, bias)


def test_a_head_stored_apart_is_untied_whatever_the_config_says(tmp_path: Path) -> None:
    _, config, tensors = stock(LM)
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1.0
    path = write_directory(tmp_path / "in", config, tensors)
    model = lathe.load(path)
    assert model.architecture.head.language is not None
    assert not model.architecture.head.language.tied
    theirs = transformers.BertForMaskedLM.from_pretrained(path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
    assert model.save(tmp_path / "out").stock
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(theirs))


def test_a_pretraining_model_drops_no_pooled_state_and_a_classifier_does() -> None:
    def dropped(kind: str, **keys: float | None) -> float:
        return read_config({"model_type": "bert", "architectures": [kind], **keys}).dropout.classifier

    assert dropped(PAIR) == 0.0
    assert dropped(LABELS) == 0.1
    assert dropped(LABELS, hidden_dropout_prob=0.2, classifier_dropout=None) == 0.2
    assert dropped(LABELS, classifier_dropout=0.4) == 0.4
    # What is no part of the class is no reason to keep a model out of its format.
    model = read_config({"model_type": "bert", "architectures": [PAIR]}).with_({"dropout.classifier": 0.3})
    assert objections(model) == []


def test_a_sharing_that_shares_nothing_is_no_objection() -> None:
    a = read_config({"model_type": "bert", "num_hidden_layers": 2})
    assert objections(a.with_(sharing="groups:2")) == []
    assert objections(a.with_(n_layers=1, sharing="all")) == []


def test_the_heads_proposed_keep_their_width_where_it_divides() -> None:
    def proposed(**changes: int) -> dict[str, Any]:
        changed = read_config({"model_type": "bert"}).with_(**changes)
        return {key: value for each in objections(changed) for key, value in each.changes.items()}

    assert proposed(d_model=512) == {"n_heads": 8}
    assert proposed(d_model=512, n_kv_heads=4) == {"n_heads": 8, "n_kv_heads": None}
    # 64 does not divide 600: of its divisors 12 is the number of heads that there were.
    assert proposed(d_model=600) == {"n_heads": 12, "d_head": 50}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"hidden_size": 20}, "hidden_size=20 in the config: expected a multiple of num_attention_heads=12"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ({"intermediate_size": -1}, "intermediate_size=-1"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"type_vocab_size": 0}, "type_vocab_size=0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]}"),
        ({"hidden_dropout_prob": 1.5}, "1.5"),
        ({"attention_probs_dropout_prob": "some"}, "'some'"),
        ({"layer_norm_eps": "small"}, "'small'"),
        ({"tie_word_embeddings": "yes", "architectures": [LM]}, "'yes'"),
        ({"pad_token_id": 99999}, "99999"),
        ({"eos_token_id": "end"}, "'end'"),
        ({"architectures": ["BertLMHeadModel"]}, "unknown class 'BertLMHeadModel'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_that_names_it(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)) as error:
        read_config({"model_type": "bert", **keys})
    assert "\n" not in str(error.value)
