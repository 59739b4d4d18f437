"""ELECTRA against its twins in `transformers`: the generator, the discriminator and what is made of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from lathe.presets import heads, preset
from tests.families.contract import FamilyContract, Outside, Variant, randomise, read

# Three heads of six behind an embedding of ten.
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "embedding_size": 10,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 26,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
}
ONE = {**SMALL, "num_hidden_layers": 1}
EVEN = {**SMALL, "embedding_size": 18}
LM, MARKS, LABELS = "ElectraForMaskedLM", "ElectraForPreTraining", "ElectraForSequenceClassification"


class TestElectra(FamilyContract):
    variants = (
        Variant(LM, SMALL, "tied"),
        Variant(LM, {**SMALL, "tie_word_embeddings": False}, "untied"),
        Variant(LM, {**EVEN, "hidden_act": "relu"}, "no-lift-relu"),
        Variant(LM, {**ONE, "embedding_size": 30, "hidden_act": "gelu_new"}, "wider-embedding-gelu_new"),
        Variant(MARKS, SMALL),
        Variant(MARKS, {**EVEN, "hidden_act": "silu"}, "no-lift-silu"),
        Variant(MARKS, {**ONE, "num_attention_heads": 9, "num_labels": 4, "hidden_act": "tanh"}, "narrow-heads-tanh"),
        Variant("ElectraModel", {**SMALL, "num_hidden_layers": 5, "hidden_act": "quick_gelu"}, "deep-quick_gelu"),
        Variant("ElectraModel", {**EVEN, "num_attention_heads": 1, "type_vocab_size": 1}, "one-head"),
        Variant(LABELS, {**SMALL, "num_labels": 5, "hidden_act": "relu"}, "relu"),
        Variant("ElectraForTokenClassification", {**SMALL, "num_labels": 4}),
    )
    outside = (
        Outside({"encoder.norm_position": "pre"}, "encoder.norm_position is pre"),
        Outside({"encoder.positions": {"kind": "sinusoidal", "max_positions": 9}}, "its positions are sinusoidal"),
        Outside({"encoder.causal": True}, "its encoder is causal"),
        Outside({"d_head": 4}, "n_heads · d_head is 3 · 4 = 12 and d_model is 18"),
        Outside({"n_kv_heads": 1}, "n_kv_heads is 1 and n_heads is 3"),
        Outside({"token_types": 0}, "it has no token types"),
        Outside({"d_embed": 18}, "d_embed and d_model are both 18"),
        Outside({"embedding.projection_bias": False}, "embedding.projection_bias is false"),
        Outside({"sharing": "all"}, "encoder.sharing is all"),
        Outside({"head.language.transform": "relu"}, "head.language.transform is relu"),
        Outside({"head.pooler": {"token": "each"}}, "its head is a masked-LM head and a pooled state of each token"),
        Outside(
            {"head.pooler": {"token": "first", "activation": "tanh"}, "head.classifier": {"n_labels": 2}},
            "its head is a masked-LM head and labels of the first token through a tanh layer",
        ),
        Outside({"head.pooler": {"token": "first", "activation": "tanh"}}, "its head is a pooled", "ElectraModel"),
        Outside({"n_labels": 2}, "head.classifier.n_labels is 2", MARKS),
        Outside({"activation": "relu"}, "labels of each token through a gelu layer", MARKS),
        Outside({"head.pooler.activation": "tanh"}, "labels of the first token through a tanh layer", LABELS),
        Outside({"dropout.embedding": 0.5}, "dropout.embedding is 0.5"),
    )


def discriminator(**config: Any) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    model = transformers.ElectraForPreTraining(transformers.ElectraConfig(**{**SMALL, **config})).eval()
    randomise(model)
    return model, {**model.config.to_dict(), "architectures": [MARKS]}, dict(model.state_dict())


def test_missing_keys_mean_what_the_stock_class_makes_of_them() -> None:
    config = transformers.ElectraConfig()
    assert read_config({"model_type": "electra"}) == read_config({**config.to_dict(), "architectures": None})


@pytest.mark.parametrize("name", ["electra-small", "electra-base", "electra-large-discriminator"])
def test_every_preset_fits_its_family(name: str) -> None:
    for head in heads(name):
        found = preset(name, head)
        assert objections(found) == []
        back = read_config(write_config(found))
        # The mask token is the tokenizer's.
        assert back.with_({"tokens.mask": found.tokens.mask}) == found


def test_the_discriminator_marks_each_token_and_its_loss_passes_over_pads() -> None:
    model, config, tensors = discriminator()
    reader = read(config, tensors)
    ours = lathe.Model(reader.architecture, {name: reader.tensor(name) for name in reader.names()})
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    marks = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]])
    with torch.no_grad():
        got = ours(ids, mask, labels=marks)
        expected = model(input_ids=ids, attention_mask=mask, labels=marks)
        other = ours(ids, mask, labels=torch.where(mask.bool(), marks, 1 - marks))
    assert got.logits.shape == (2, 4)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-4)
    assert torch.equal(got.loss, other.loss)


def test_a_mark_that_is_neither_yes_nor_no_is_named() -> None:
    _, config, tensors = discriminator()
    reader = read(config, tensors)
    ours = lathe.Model(reader.architecture, {name: reader.tensor(name) for name in reader.names()})
    with pytest.raises(RequestError, match=r"label 2 at \[0, 1\]: expected 0 to 1"):
        ours(torch.tensor([[5, 6]]), labels=torch.tensor([[0, 2]]))


def test_a_classifier_is_read_from_nothing_but_its_own_head() -> None:
    """A discriminator's file has no classification head, and says so instead of drawing one."""
    _, config, tensors = discriminator()
    with pytest.raises(RequestError, match=r"'classifier\.dense\.weight' is missing from the file"):
        read({**config, "architectures": [LABELS]}, tensors)


def test_the_body_of_a_discriminator_is_read_without_its_marks() -> None:
    _, config, tensors = discriminator()
    tensors["electra.embeddings.position_ids"] = torch.arange(16)[None]
    reader = read({**config, "architectures": ["ElectraModel"]}, tensors)
    assert set(reader.left_out) == {name for name in tensors if name.startswith("discriminator_predictions.")}


def test_the_generators_dense_layer_has_a_gelu_whatever_the_config_says() -> None:
    a = read_config({"model_type": "electra", "architectures": [LM], "hidden_act": "relu"})
    assert a.head.language is not None
    assert (a.head.language.transform, a.encoder and a.encoder.feed_forward.activation) == ("gelu", "relu")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"hidden_size": 30}, "hidden_size=30 in the config: expected a multiple of num_attention_heads=4"),
        ({"embedding_size": 0}, "embedding_size=0"),
        ({"embedding_size": "narrow"}, "embedding_size='narrow'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"architectures": ["ElectraForCausalLM"]}, "unknown class 'ElectraForCausalLM'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_that_names_it(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)) as error:
        read_config({"model_type": "electra", **keys})
    assert "\n" not in str(error.value)
