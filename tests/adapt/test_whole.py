"""Layers that an adapter has whole: PEFT's `modules_to_save` in and out, held against `peft` itself."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lathe
from lathe.adapt import (
    LoraSettings,
    adapter_names,
    add_lora,
    combine,
    load_adapter,
    merge,
    remove_adapters,
    save_adapter,
    set_active,
    unmerge,
)
from lathe.errors import RequestError
from tests.adapt.twins import IDS, STOCK, adapted, opened

# The stock class, the modules that LoRA goes on, and what PEFT is to save whole.
CLASSIFIERS: dict[str, tuple[str, list[str], list[str]]] = {
    "bert": ("BertForSequenceClassification", ["query", "value"], ["classifier", "score"]),
    "bert-pooled": ("BertForSequenceClassification", ["query", "output.dense"], ["pooler", "classifier"]),
    "albert": ("AlbertForSequenceClassification", ["query"], ["classifier"]),
    "electra": ("ElectraForSequenceClassification", ["query"], ["classifier"]),
    "bart": ("BartForSequenceClassification", ["q_proj"], ["classification_head"]),
    "t5": ("T5ForSequenceClassification", ["q"], ["classification_head.out_proj"]),
    "gpt2": ("GPT2ForSequenceClassification", ["c_attn"], ["score"]),
    "llama": ("LlamaForSequenceClassification", ["q_proj"], ["score"]),
}


TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def classifier(name: str) -> Any:
    """A stock classifier with random weights."""
    kind = getattr(transformers, CLASSIFIERS[name][0])
    config = dict(STOCK[name.split("-")[0] if name != "electra" else "bert"].config)
    more = {"embedding_size": 12} if name == "electra" else {}
    return kind(kind.config_class(**{**config, **more, "num_labels": 3, **TOKENS})).eval()


def disturb(model: torch.nn.Module) -> None:
    """Move everything that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_whole_head_of_peft_computes_the_same_here_and_after_it_is_written_again(name: str, tmp_path: Path) -> None:
    base = classifier(name)
    _, targets, saved = CLASSIFIERS[name]
    theirs = adapted(base, targets, modules_to_save=saved, task_type="SEQ_CLS")
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lathe.load(base)
    load_adapter(ours, tmp_path / "theirs")
    assert (logits(base) - logits(ours)).abs().max() > 1e-3
    close(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    stored, written = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[key], written[key]) for key in stored)
    close(opened(base, tmp_path / "ours"), theirs)
    merge(ours)
    close(ours, theirs)
    ours.save(tmp_path / "merged")
    close(type(base).from_pretrained(tmp_path / "merged").eval(), theirs)


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
def test_a_head_that_was_trained_whole_here_opens_in_peft(name: str, tmp_path: Path) -> None:
    base = classifier(name)
    ours = lathe.load(base)
    made = add_lora(ours, LoraSettings(rank=2, targets="reader:heads", whole="head.*"))
    assert "head.classifier" in made
    torch.testing.assert_close(logits(ours), logits(base), atol=1e-5, rtol=0)
    disturb(ours)
    assert (logits(base) - logits(ours)).abs().max() > 1e-3
    save_adapter(ours, tmp_path / "ours")
    close(opened(base, tmp_path / "ours"), ours)
    back = lathe.load(base)
    load_adapter(back, tmp_path / "ours")
    assert torch.equal(logits(back), logits(ours))


def test_each_adapter_on_one_base_has_a_head_of_its_own() -> None:
    base = classifier("bert")
    ours = lathe.load(base)
    settings = LoraSettings(rank=2, targets="reader:heads", whole="head.classifier")
    found = {}
    for name in ("a", "b"):
        add_lora(ours, settings, name=name)
        assert [n for n, p in ours.named_parameters() if p.requires_grad and ".adapters." not in n] == []
        disturb(ours)
        found[name] = logits(ours)
    with pytest.raises(RequestError, match=r"trained head\.classifier whole, which does not add up"):
        combine(ours, {"a": 0.5, "b": 0.5}, name="both")
    set_active(ours, "a")
    assert torch.equal(logits(ours), found["a"])
    merge(ours)
    torch.testing.assert_close(logits(ours), found["a"], atol=1e-5, rtol=0)
    unmerge(ours)
    set_active(ours, "b")
    assert torch.equal(logits(ours), found["b"])
    remove_adapters(ours, "b")
    torch.testing.assert_close(logits(ours), logits(base), atol=1e-5, rtol=0)
    set_active(ours, "a")
    assert torch.equal(logits(ours), found["a"])
    remove_adapters(ours)
    torch.testing.assert_close(logits(ours), logits(base), atol=1e-5, rtol=0)
    assert [name for name, _ in ours.named_parameters()] == list(lathe.load(base).tensors())


def test_a_layer_is_adapted_or_whole() -> None:
    ours = lathe.load(classifier("bert"))
    with pytest.raises(RequestError, match=r"head\.classifier is among targets and among whole"):
        add_lora(ours, LoraSettings(targets="head.*", rank=2, whole="head.classifier"))
    with pytest.raises(RequestError, match=r"whole='\*\.nothing' matches no linear layer"):
        add_lora(ours, LoraSettings(whole="*.nothing"))
    with pytest.raises(RequestError, match="expected terms with commas between"):
        LoraSettings(whole="head.*,")
    assert adapter_names(ours) == ()


# --- files that do not fit -----------------------------------------------------------------------------


def refused(folder: Path, base: Any = None) -> str:
    model = lathe.load(base if base is not None else classifier("bert"))
    with pytest.raises(RequestError) as error:
        load_adapter(model, folder)
    assert adapter_names(model) == ()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_whole_layers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ours = lathe.load(classifier("bert"))
    add_lora(ours, LoraSettings(rank=2, targets="reader:heads", whole="head.classifier"))
    folder = save_adapter(ours, tmp_path / "adapter")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)
    assert values["modules_to_save"] == ["classifier"]
    assert values["task_type"] == "SEQ_CLS"
    kind = transformers.BertForSequenceClassification
    other = kind(kind.config_class(**STOCK["bert"].config, num_labels=5))
    assert "has shape (3, 24)" in refused(folder, other)
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**STOCK["bert"].config))
    assert "'base_model.model.classifier.bias' belongs to no linear layer of this model" in refused(folder, masked)

    bias = "base_model.model.classifier.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != bias}, weights)
    assert "the file holds no 'classifier.bias'" in refused(folder)
    save_file(tensors, weights)
    config.write_text(json.dumps({**values, "modules_to_save": None}))
    assert "belongs to classifier, which modules_to_save does not name" in refused(folder)
    config.write_text(json.dumps({**values, "modules_to_save": ["classifier", "LayerNorm"]}))
    assert "'bert.embeddings.LayerNorm', which is no linear layer" in refused(folder)
    config.write_text(json.dumps({**values, "modules_to_save": "classifier"}))
    assert "modules_to_save='classifier'" in refused(folder)


def test_what_peft_saves_of_tables_is_refused_with_what_it_is(tmp_path: Path) -> None:
    stock = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    whole = peft.LoraConfig(target_modules=["q"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(stock), whole).save_pretrained(tmp_path / "head")
        plain = peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(target_modules=["q"]))
        plain.save_pretrained(tmp_path / "tables", save_embedding_layers=True)
        tuned = peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(target_modules=["q", "lm_head"]))
        tuned.save_pretrained(tmp_path / "tuned")
        shared = peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(target_modules=["q", "shared"]))
        shared.save_pretrained(tmp_path / "shared")
    for name in ("head", "tuned"):
        assert "belongs to an output matrix of its own, and this model's is its token table" in refused(
            tmp_path / name, stock
        )
    for name in ("tables", "shared"):
        assert "belongs to shared, which is no linear layer" in refused(tmp_path / name, stock)
