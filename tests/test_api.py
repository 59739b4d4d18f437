"""What a user holds: load, save, resize, generate, to and from transformers; in every family."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import lathe
from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.text.train import train_tokenizer

SMALL = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_head": 12, "d_ff": 32, "vocab_size": 60}
CUTS: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 18},
    "flan-t5-small": {"d_model": 18},
    "gpt2": {"d_model": 18},
    "llama-2-7b": {"d_model": 18},
    "qwen2-0.5b": {"d_model": 18},
    "mbart-large": {"d_model": 18, "method": "select"},
    "bart-base": {"d_model": 18},
    "bert-base-uncased": {"d_model": 18},
    "albert-base": {"d_embed": 8},
    "albert-base-v1": {"d_model": 18},
    "electra-base": {"d_model": 18},
    "electra-small": {"d_model": 18},
}


# A file that wants whole copies of a post-norm stream, or heads that fill the width, gets sizes that it can hold.
FEWER: dict[str, dict[str, Any]] = {"d_ff": {"d_ff": 20}, "n_heads": {"n_heads": 1}, "n_layers": {"n_layers": 1}}
MORE: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 30, "d_ff": 40, "n_heads": 3, "n_layers": 3},
    "flan-t5-small": {"d_model": 30, "d_ff": 40, "n_heads": 3, "n_layers": 3},
    "gpt2": {"d_model": 36, "d_ff": 40, "n_heads": 3, "n_layers": 3},
    "llama-2-7b": {"d_model": 30, "d_ff": 40, "n_heads": 3, "n_layers": 3},
    "qwen2-0.5b": {"d_model": 30, "d_ff": 40, "n_heads": 3, "n_layers": 3},
    "mbart-large": {"d_model": 48, "d_ff": 40, "n_heads": 4, "n_layers": 3},
    "bart-base": {"d_model": 48, "d_ff": 40},
    "bert-base-uncased": {"d_model": 48, "d_ff": 40, "n_heads": 4},
    "albert-base": {"d_model": 48, "d_ff": 40},
    "electra-small": {"d_model": 48, "d_ff": 40},
}


def small(name: str) -> Architecture:
    head = "masked" if name.startswith(("bert", "albert", "electra")) else None
    sizes: dict[str, Any] = {**SMALL, "d_embed": 12} if name.startswith(("albert", "electra")) else SMALL
    if name.startswith("qwen2"):
        sizes = {**sizes, "n_kv_heads": 1}
    return lathe.preset(name, head=head).with_(sizes)


def batch(architecture: Architecture) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 60, (6, 10), generator=torch.Generator().manual_seed(0))
    both = architecture.encoder is not None and architecture.decoder is not None
    return {"input_ids": ids, "decoder_input_ids": ids[:, :7]} if both else {"input_ids": ids}


def assert_stock(model: lathe.Model, directory: Path) -> None:
    """Stock `transformers` opens the model with nothing missing, and computes what it computes."""
    saved = model.save(directory)
    assert saved.stock, saved.reasons
    kind = getattr(transformers, model.to_transformers().config.architectures[0])
    stock, told = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = batch(model.architecture)
    with torch.no_grad():
        ours, theirs = model(**text).logits, stock.eval()(**text).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    again = lathe.load(directory)
    torch.testing.assert_close(again(**text).logits, model(**text).logits, atol=0, rtol=0)
    # A stock config has no place for the mask token's id; the tokenizer carries it.
    assert again.architecture == model.architecture.with_({"tokens.mask": None})


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_opens_in_stock_transformers_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = lathe.Model(small(name), seed=1)
    cut = lathe.resize(model, calibrate=[batch(model.architecture)], **CUTS[name])
    assert_stock(cut, tmp_path / "cut")


def test_a_resize_that_is_asked_nothing_is_refused() -> None:
    with pytest.raises(lathe.RequestError, match="nothing to change: give a size"):
        lathe.resize(lathe.Model(small("gpt2"), seed=1))


@pytest.mark.parametrize("field", FEWER)
@pytest.mark.parametrize("name", MORE)
def test_a_pruned_model_opens_in_stock_transformers_with_the_same_logits(name: str, field: str, tmp_path: Path) -> None:
    model = lathe.Model(small(name), seed=1)
    pruned = lathe.resize(model, calibrate=[batch(model.architecture)], **FEWER[field])
    assert not pruned.steps[0].exact
    assert_stock(pruned, tmp_path / "pruned")


@pytest.mark.parametrize("name", MORE)
def test_a_grown_model_opens_in_stock_transformers_and_says_what_it_said(name: str, tmp_path: Path) -> None:
    model = lathe.Model(small(name), seed=1)
    grown = lathe.resize(model, **MORE[name])
    assert all(step.exact for step in grown.steps)
    text = batch(model.architecture)
    torch.testing.assert_close(grown(**text).logits, model(**text).logits, atol=1e-5, rtol=1e-5)
    assert_stock(grown, tmp_path / "grown")


def test_resizing_leaves_the_model_as_it_was() -> None:
    model = lathe.Model(small("t5-small"), seed=1)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    lathe.resize(model, d_model=12, calibrate=[batch(model.architecture)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors().items())


def test_plain_ids_calibrate_any_model() -> None:
    ids = torch.randint(4, 60, (6, 10))
    for name in ("t5-small", "gpt2"):
        cut = lathe.resize(lathe.Model(small(name), seed=1), d_model=12, calibrate=[ids])
        assert cut.architecture.d_model == 12
        assert [step.exact for step in cut.steps] == [False] * len(cut.steps)


def test_an_architecture_that_no_family_holds_is_saved_and_loaded_in_lathes_own_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = small("t5-small").with_(d_embed=8, sharing="feed_forward")
    model = lathe.Model(odd, seed=1)
    saved = model.save(tmp_path / "odd")
    assert not saved.stock
    assert "own form" in caplog.text
    assert not (tmp_path / "odd" / "config.json").exists()
    again = lathe.load(tmp_path / "odd")
    assert again.architecture == odd
    text = batch(odd)
    torch.testing.assert_close(again(**text).logits, model(**text).logits, atol=0, rtol=0)
    with pytest.raises(lathe.RequestError, match="cannot hold"):
        model.to_transformers()


def test_loading_something_else_says_what_is_expected() -> None:
    with pytest.raises(lathe.RequestError, match="expected a directory, a hub id or a transformers model"):
        lathe.load(torch.nn.Linear(2, 2))


def test_loading_at_another_precision_converts() -> None:
    model = lathe.Model(small("gpt2"), seed=1)
    assert lathe.load(model.to_transformers(), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bart-base", "t5-small", "gpt2"])
def test_an_object_of_transformers_generates_as_the_saved_directory_does(name: str, tmp_path: Path) -> None:
    tokens = small(name).tokens
    ids = {"pad_token_id": tokens.pad, "bos_token_id": tokens.bos, "decoder_start_token_id": tokens.decoder_start}
    ids["eos_token_id"] = tokens.eos[0] if tokens.eos else None
    settings = {"num_beams": 3, "max_new_tokens": 7}
    named = {key: each for key, each in ids.items() if each is not None}
    for number, generation in enumerate(({}, {**named, **settings})):
        model = lathe.Model(small(name), seed=1, generation=generation)
        made = model.to_transformers()
        model.save(tmp_path / str(number))
        saved = type(made).from_pretrained(tmp_path / str(number))
        assert made.generation_config.to_dict() == saved.generation_config.to_dict()
    # Where the settings name no tokens, the model's own serve.
    made = lathe.Model(small(name), seed=1, generation=settings).to_transformers()
    found = made.generation_config
    assert {key: getattr(found, key) for key in (*ids, *settings)} == {**ids, **settings}


def test_a_model_keeps_the_mode_of_the_object_it_came_from() -> None:
    stock = lathe.Model(small("gpt2"), seed=1).to_transformers()
    assert not lathe.load(stock.eval()).training
    assert lathe.load(stock.train()).training


def test_a_model_can_be_planned() -> None:
    plan = lathe.Model(small("t5-small"), seed=0).plan(d_model=16).to_dict()
    assert plan["before"]["parameters"]["total"] > plan["after"]["parameters"]["total"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_model_in_memory_is_resized_wherever_its_files_are_by_now(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lathe.Model(small("gpt2"), seed=0).save("gpt2")
    model = lathe.load("gpt2")
    if gone:
        shutil.rmtree("gpt2")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    grown = lathe.resize(model, d_ff=40)
    assert grown.history is not None
    assert grown.history.base is None  # a directory of that name once, and no model of the hub
    assert grown.history.recipe.obstacle == ("its source was a model in memory that no files hold" if gone else "")


def test_another_tokenizer_than_the_files_is_no_model_that_they_hold(tmp_path: Path) -> None:
    one, other = (train_tokenizer([f"{word} turns wood"] * 9, 265, convention="gpt2") for word in ("lathe", "plane"))
    lathe.Model(small("gpt2").with_(vocab_size=265), seed=0, tokenizer=one).save(tmp_path / "gpt2")
    model = lathe.load(tmp_path / "gpt2")
    model.tokenizer = other
    grown = lathe.resize(model, d_ff=40)
    assert grown.history is not None
    assert "no files hold" in grown.history.recipe.obstacle


def test_a_tokenizer_of_another_library_is_refused() -> None:
    model = lathe.Model(small("gpt2"), seed=0)
    with pytest.raises(RequestError, match=r"expected a lathe\.Tokenizer, not a str"):
        model.tokenizer = "gpt2"  # type: ignore[assignment]
    assert model.tokenizer is None


def test_weights_of_several_types_are_read_in_the_widest(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=24, d_kv=12, num_heads=2, d_ff=32, num_layers=1, vocab_size=60)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    half = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", dtype=torch.float16)
    assert len({tensor.dtype for tensor in half.state_dict().values()}) == 2  # it keeps `wo` wide
    half.save_pretrained(tmp_path / "half")
    given = batch(lathe.load(tmp_path / "half").architecture)
    for model in (lathe.load(tmp_path / "half"), lathe.load(half)):
        assert {tensor.dtype for tensor in model.tensors().values()} == {torch.float32}
        with torch.no_grad():
            torch.testing.assert_close(model(**given).logits, half.float()(**given).logits, rtol=1e-4, atol=1e-4)
    assert lathe.load(tmp_path / "half", dtype=torch.float16).dtype == torch.float16


def test_numbers_of_8_bits_among_wider_ones_are_read_as_those(tmp_path: Path) -> None:
    lathe.Model(small("gpt2"), seed=0, dtype=torch.bfloat16).save(tmp_path / "gpt2")
    tensors = safetensors.torch.load_file(tmp_path / "gpt2/model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    safetensors.torch.save_file(
        {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "gpt2/model.safetensors", {"format": "pt"}
    )
    assert {tensor.dtype for tensor in lathe.load(tmp_path / "gpt2").tensors().values()} == {torch.bfloat16}


@pytest.mark.parametrize("size", ["10kB", 0, 1.5])
def test_a_shard_of_no_bytes_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^max_shard_bytes=.*expected a number of bytes"):
        lathe.Model(small("gpt2"), seed=0).save(tmp_path / "gpt2", max_shard_bytes=size)
    assert not (tmp_path / "gpt2").exists()


def test_a_number_is_no_vocabulary() -> None:
    with pytest.raises(RequestError, match=r"^vocabulary=5: expected text"):
        lathe.resize(lathe.Model(small("gpt2"), seed=0), vocabulary=5)  # type: ignore[arg-type]


def test_settings_that_name_no_tokens_are_saved_with_the_models_own(tmp_path: Path) -> None:
    model = lathe.Model(small("t5-small"), seed=0, generation={"num_beams": 2})
    model.save(tmp_path / "t5")
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5").generation_config
    assert (stock.num_beams, stock.eos_token_id, stock.pad_token_id, stock.decoder_start_token_id) == (2, 1, 0, 0)
