"""Conversions between families: exact where only the format changes, stock files on the way, a clear no elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lathe
from lathe.errors import RequestError
from lathe.reshape import resize
from tests.reshape.test_width import build, text

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24, "vocab_size": 40}


def tiny_bert() -> lathe.Model:
    architecture = lathe.preset("bert-base-uncased", head="masked").with_({**TINY, "max_positions": 24})
    model = lathe.Model(architecture, seed=0)
    model.load_state_dict({name: t.float() for name, t in build(architecture).state_dict().items()})
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(5, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def reopened(model: lathe.Model, folder) -> torch.nn.Module:
    """The saved model as stock transformers opens it, with nothing missing and nothing left over."""
    assert model.save(folder).stock
    stock, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return stock.eval()


def test_bert_becomes_electra_becomes_albert(tmp_path):
    bert = tiny_bert()
    batches = [torch.randint(0, 40, (16, 20), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    electra = lathe.resize(bert, family="electra", d_embed=8, calibrate=batches)
    albert = lathe.resize(electra, family="albert", sharing="all", calibrate=batches)
    for name, model in (("electra", electra), ("albert", albert)):
        stock = reopened(model, tmp_path / name)
        config: Any = stock.config
        assert config.model_type == name
        assert config.embedding_size == 8
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    assert [step.name for step in electra.steps if step.exact] == ["family bert → electra"]
    assert albert.architecture.encoder is not None
    assert albert.architecture.encoder.n_attentions == 1
    assert not all(step.exact for step in albert.steps)


@pytest.mark.parametrize("family", ["electra", "albert"])
def test_the_format_alone_changes_nothing(family, tmp_path):
    """At the full embedding width ELECTRA needs no lifting matrix, and ALBERT takes the identity."""
    bert = tiny_bert()
    converted = lathe.resize(bert, family=family)
    assert all(step.exact for step in converted.steps)
    torch.testing.assert_close(logits(converted), logits(bert), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(reopened(converted, tmp_path / family)), logits(bert), rtol=1e-5, atol=1e-5)


def test_an_albert_unshared_becomes_an_electra(tmp_path):
    a = lathe.preset("albert-base", head="masked").with_(
        {**TINY, "d_embed": 8, "max_positions": 24, "activation": "gelu"}
    )
    albert = lathe.Model(a.with_({"head.language.transform": "gelu"}), seed=0)
    electra = lathe.resize(albert, family="electra")
    assert all(step.exact for step in electra.steps)
    assert electra.architecture.encoder is not None
    assert electra.architecture.encoder.n_attentions == 2
    torch.testing.assert_close(logits(electra), logits(albert), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(reopened(electra, tmp_path / "e")), logits(albert), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_llama_gets_the_zeros_that_its_relatives_want(family, tmp_path):
    sizes = {**TINY, "n_kv_heads": 1, "max_positions": 24}
    llama = lathe.Model(lathe.preset("llama-2-7b").with_(sizes), seed=0)
    converted = lathe.resize(llama, family=family)
    assert all(step.exact for step in converted.steps)
    assert converted.save(tmp_path / family).stock
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
    torch.testing.assert_close(logits(stock), logits(llama), rtol=1e-4, atol=1e-5)


def test_what_another_family_computes_otherwise_is_named():
    with pytest.raises(RequestError, match=r"family=llama.*positions"):
        lathe.resize(lathe.Model(lathe.preset("gpt2").with_({**TINY, "max_positions": 24})), family="llama")
    bart = lathe.preset("bart-base").with_({**TINY, "max_positions": 24})
    with pytest.raises(RequestError, match="norm_position"):
        resize(build(bart), {"family": "mbart"}, calibrate=[text(bart)])
    with pytest.raises(RequestError, match="unknown model_type"):
        lathe.resize(tiny_bert(), family="roberta")
