"""ALBERT against its twins in `transformers`: factorised embeddings, and layers shared in groups and cycles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families import objections, read_config, write_config
from lathe.presets import heads, preset
from tests.families.contract import FamilyContract, Outside, Variant, randomise, read

# Three heads of six behind an embedding of ten, one set of weights for three layers.
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "embedding_size": 10,
    "hidden_size": 18,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 26,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
}
ONE = {**SMALL, "num_hidden_layers": 1}
UNTIED = {**SMALL, "tie_word_embeddings": False}
LM, PAIR, LABELS = "AlbertForMaskedLM", "AlbertForPreTraining", "AlbertForSequenceClassification"


def layers(runs: int, groups: int, cycle: int) -> dict[str, Any]:
    return {**SMALL, "num_hidden_layers": runs, "num_hidden_groups": groups, "inner_group_num": cycle}


class TestAlbert(FamilyContract):
    sentence_label = "sentence_order_label"
    variants = (
        Variant(LM, SMALL, "tied"),
        Variant(LM, UNTIED, "untied"),
        Variant(LM, {**layers(4, 2, 1), "hidden_act": "gelu"}, "groups-gelu"),
        Variant(LM, {**layers(2, 1, 3), "hidden_act": "relu"}, "cycle-relu"),
        Variant(LM, {**layers(4, 2, 2), "hidden_act": "silu"}, "groups-of-cycles-silu"),
        Variant(LM, {**layers(3, 3, 1), "hidden_act": "tanh"}, "unshared-tanh"),
        Variant(LM, {**layers(2, 2, 2), "hidden_act": "quick_gelu"}, "unshared-in-cycles-quick_gelu"),
        Variant(LM, {**ONE, "embedding_size": 18, "num_attention_heads": 9}, "lifted-to-the-same-width"),
        Variant("AlbertModel", {**SMALL, "num_attention_heads": 1, "type_vocab_size": 1}, "one-head"),
        Variant(PAIR, SMALL),
        Variant(PAIR, UNTIED, "untied"),
        Variant(LABELS, {**layers(4, 2, 2), "num_labels": 5}),
        Variant("AlbertForTokenClassification", {**SMALL, "num_labels": 4, "classifier_dropout_prob": 0.0}),
    )
    outside = (
        Outside({"encoder.norm_position": "pre"}, "encoder.norm_position is pre"),
        Outside({"encoder.positions": {"kind": "relative"}}, "its positions are relative"),
        Outside({"encoder.causal": True}, "its encoder is causal"),
        Outside({"d_head": 4}, "n_heads · d_head is 3 · 4 = 12 and d_model is 18"),
        Outside({"n_kv_heads": 1}, "n_kv_heads is 1 and n_heads is 3"),
        Outside({"token_types": 0}, "it has no token types"),
        Outside({"d_embed": None, "embedding.projection_bias": False}, "its embedding is not factorised"),
        Outside({"embedding.projection_bias": False}, "embedding.projection_bias is false"),
        Outside({"sharing": "attention"}, "its layers share their attention alone"),
        Outside({"sharing": "feed_forward"}, "its layers share their feed-forward alone"),
        Outside({"n_layers": 4, "sharing": "feed_forward:groups:2"}, "its layers share their feed-forward alone"),
        Outside({"head.language.transform": "relu"}, "head.language.transform is relu"),
        Outside({"head.pooler": None}, "its head is nothing", "AlbertModel"),
        Outside({"head.pooler.token": "last"}, "labels of the last token", LABELS),
        Outside({"dropout.embedding": 0.5}, "dropout.embedding is 0.5"),
    )

    @classmethod
    def finish(cls, model: Any, variant: Variant) -> None:
        """Let the untied head's two biases be equal, as Lathe writes them."""
        if variant.config is UNTIED:
            with torch.no_grad():
                model.predictions.bias.copy_(model.predictions.decoder.bias)


def test_missing_keys_mean_what_the_stock_class_makes_of_them() -> None:
    config = transformers.AlbertConfig()
    assert read_config({"model_type": "albert"}) == read_config({**config.to_dict(), "architectures": None})


@pytest.mark.parametrize("name", ["albert-base", "albert-xxlarge", "albert-base-v2"])
def test_every_preset_fits_its_family(name: str) -> None:
    for head in heads(name):
        found = preset(name, head)
        if head == "none":
            assert [each.changes for each in objections(found)] == [
                {"head.pooler": {"token": "first", "activation": "tanh"}}
            ]
        else:
            assert objections(found) == []
            # The mask token is the tokenizer's.
            assert read_config(write_config(found)).with_({"tokens.mask": found.tokens.mask}) == found


@pytest.mark.parametrize(
    ("runs", "groups", "cycle", "n_layers", "sharing"),
    [
        (12, 1, 1, 12, "all"),
        (12, 3, 1, 12, "groups:3"),
        (6, 1, 2, 12, "cycle:2"),
        (6, 3, 2, 12, "groups:3,cycle:2"),
        (12, 12, 1, 12, "none"),
        (1, 1, 1, 1, "all"),
        (1, 1, 4, 4, "cycle:4"),
    ],
)
def test_groups_and_cycles(runs: int, groups: int, cycle: int, n_layers: int, sharing: str) -> None:
    keys = {"num_hidden_layers": runs, "num_hidden_groups": groups, "inner_group_num": cycle}
    a = read_config({"model_type": "albert", **keys})
    assert a.encoder is not None
    assert (a.encoder.n_layers, str(a.encoder.sharing)) == (n_layers, sharing)
    written = write_config(a)
    assert {key: written[key] for key in keys} == keys


def born(sharing: str, n_layers: int) -> Architecture:
    """A small ALBERT that no file has described."""
    small = preset("albert-base", "masked").with_(
        d_model=18, d_embed=10, n_heads=3, d_head=6, d_ff=26, vocab_size=53, max_positions=16
    )
    return small.with_(n_layers=n_layers, sharing=sharing)


@pytest.mark.parametrize(
    ("sharing", "n_layers"),
    [
        ("none", 3),
        ("none", 1),
        ("all", 1),
        ("groups:3", 3),
        ("cycle:4", 4),
        ("groups:2,cycle:3", 6),
        ("groups:2,cycle:2", 8),
        ("attention:groups:3", 3),
        ("feed_forward:cycle:2", 2),
    ],
)
def test_the_stock_class_runs_the_layers_that_lathe_runs(sharing: str, n_layers: int, tmp_path: Path) -> None:
    """Sharing in so many sets as there are layers is none, whatever it is called."""
    ours = lathe.Model(born(sharing, n_layers), seed=0)
    randomise(ours)
    assert ours.save(tmp_path / "out").stock
    theirs, info = transformers.AlbertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[5, 17, 40, 8], [9, 9, 50, 2]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-4)
    again = lathe.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_a_file_with_every_head_is_read() -> None:
    """albert-base-v2's config names the masked LM; files of that age hold the pooler and the sentence head too."""
    model = transformers.AlbertForPreTraining(transformers.AlbertConfig(**SMALL)).eval()
    randomise(model)
    tensors = dict(model.state_dict())
    tensors["albert.embeddings.position_ids"] = torch.arange(16)[None]
    leftovers = {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0}
    reader = read({**model.config.to_dict(), **leftovers, "architectures": [LM]}, tensors)
    assert set(reader.left_out) == {
        "albert.pooler.weight",
        "albert.pooler.bias",
        "sop_classifier.classifier.weight",
        "sop_classifier.classifier.bias",
    }
    ours = lathe.Model(reader.architecture, {name: reader.tensor(name) for name in reader.names()})
    ids = torch.tensor([[5, 17, 40, 8]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).prediction_logits, rtol=0, atol=1e-4)


def test_the_config_says_how_many_sentence_labels_there_are() -> None:
    """BERT's pretraining class has two whatever its config says; ALBERT's asks it."""
    a = read_config({"model_type": "albert", "architectures": [PAIR], "num_labels": 3})
    assert a.head.classifier is not None
    assert a.head.classifier.n_labels == 3
    assert len(write_config(a)["id2label"]) == 3


def test_both_of_its_names_for_the_sentence_logits_answer() -> None:
    config = {"model_type": "albert", "architectures": [PAIR], **SMALL}
    out = lathe.Model(read_config(config), seed=0)(torch.tensor([[5, 6]]))
    assert out.sop_logits is not None
    assert out.sop_logits is out.seq_relationship_logits
    assert out.prediction_logits is out.logits


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_hidden_groups": 5}, "num_hidden_groups=5 in the config: expected a divisor of num_hidden_layers=12"),
        ({"num_hidden_groups": 24}, "num_hidden_groups=24 in the config: expected a divisor of num_hidden_layers=12"),
        ({"num_hidden_groups": 0}, "num_hidden_groups=0"),
        ({"inner_group_num": "two"}, "inner_group_num='two'"),
        ({"embedding_size": -1}, "embedding_size=-1"),
        ({"hidden_size": 100}, "hidden_size=100 in the config: expected a multiple of num_attention_heads=64"),
        ({"classifier_dropout_prob": 1.0}, "1.0"),
        ({"position_embedding_type": "relative_key_query"}, "position_embedding_type='relative_key_query'"),
        ({"architectures": ["AlbertForMultipleChoice"]}, "unknown class 'AlbertForMultipleChoice'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_that_names_it(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)) as error:
        read_config({"model_type": "albert", **keys})
    assert "\n" not in str(error.value)
