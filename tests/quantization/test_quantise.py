"""Quantised models: which matrices, how close, saved and read back, in every family and beyond them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lathe
from lathe.errors import RequestError
from lathe.model.codes import Codes
from lathe.quantization import QuantizedEmbedding, QuantizedLinear, codes_of, is_quantized
from lathe.quantization.gptq import gptq, output_error
from lathe.quantization.nearest import choose_grid, nearest

SMALL: dict[str, Any] = {"d_model": 64, "d_ff": 96, "n_layers": 2, "n_heads": 4, "d_head": 16, "vocab_size": 48}
FAMILIES: dict[str, tuple[str, str | None, Mapping[str, Any]]] = {
    "llama": ("llama-3.2-1b", None, {"n_kv_heads": 2}),
    "bert": ("bert-base-uncased", "masked", {}),
    "electra": ("electra-small", "masked", {"d_embed": 32}),
    "albert": ("albert-base", "masked", {"d_embed": 32}),
    "t5": ("t5-small", None, {}),
    "flan-t5": ("flan-t5-small", None, {}),
    "bart": ("bart-base", None, {}),
    "gpt2": ("gpt2", None, {}),
}


def drawn(name: str = "llama", **changes: Any) -> lathe.Model:
    """A small model of a family, with weights wide enough that every layer counts."""
    preset, head, sizes = FAMILIES[name]
    base = lathe.preset(preset, head=head)
    tokens = {**base.tokens.to_dict(), "pad": 0, "bos": 1, "eos": [2], "mask": None}
    tokens["decoder_start"] = 0 if base.encoder is not None and base.decoder is not None else None
    model = lathe.Model(base.with_({**SMALL, **sizes, "tokens": tokens, **changes}), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def inputs(model: lathe.Model, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(2))
    both = model.encoder is not None and model.decoder is not None
    return {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}


def text(model: lathe.Model) -> list[dict[str, Tensor]]:
    return [inputs(model, rows=32, length=20)]


def logits(model: lathe.Model) -> Tensor:
    with torch.no_grad():
        found = model(**inputs(model)).logits
    assert found is not None
    return found


def moved(before: Tensor, after: Tensor) -> float:
    return float((before - after).norm() / before.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reloads_to_the_same_logits_and_generates(name: str, tmp_path: Path):
    model = drawn(name)
    quantised = lathe.quantize(model, bits=8)
    assert is_quantized(quantised)
    assert not is_quantized(model)
    assert moved(logits(model), logits(quantised)) < 0.15
    saved = quantised.save(tmp_path / "q")
    assert saved.stock == (name != "gpt2")
    again = lathe.load(tmp_path / "q")
    assert torch.equal(logits(again), logits(quantised))
    assert sorted(codes_of(again)) == sorted(codes_of(quantised))
    for key, codes in codes_of(quantised).items():
        assert codes_of(again)[key].activations == codes.activations, key
    # A table that is only looked up multiplies nothing.
    looked_up = {name for name, codes in codes_of(quantised).items() if codes.activations == "none"}
    language = model.architecture.head.language
    assert language is not None
    assert looked_up == (set() if language.tied else {"embedding.tokens.weight"})
    if model.decoder is not None:
        ids = inputs(model)["input_ids"]
        one, other = (each.generate(ids, max_new_tokens=4, do_sample=False) for each in (quantised, again))
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 8, "activations": "none"},
        {"bits": 8, "group": 32, "symmetric": False},
        {"bits": 4, "symmetric": False},
        {"bits": 4, "tables": 4},
        {"bits": 4, "tables": 16, "keep": ["*.down"]},
    ],
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_every_scheme_comes_back_as_it_was_written(name: str, how: dict[str, Any], tmp_path: Path):
    quantised = lathe.quantize(drawn(name, tied=False) if name == "llama" else drawn(name), **how)
    # transformers opens no T5 with packed codes, and no packed zero points or tables at all.
    stock = how.get("symmetric", True) and (name == "llama" or how == {"bits": 8, "activations": "none"})
    assert quantised.save(tmp_path / "q").stock == (stock and how.get("tables") != 4)
    again = lathe.load(tmp_path / "q")
    assert torch.equal(logits(again), logits(quantised))
    for key, codes in codes_of(quantised).items():
        found = codes_of(again)[key]
        assert (found.bits, found.group_size) == (codes.bits, codes.group_size)
        assert torch.equal(found.codes_OI, codes.codes_OI)
        assert (found.zeros_OG is None) == (codes.zeros_OG is None)


def test_tied_tables_stay_tied_and_untied_ones_are_both_quantised():
    tied, untied = lathe.quantize(drawn("llama", tied=True)), lathe.quantize(drawn("llama", tied=False))
    assert isinstance(tied.embedding.tokens, QuantizedEmbedding)
    assert "head.language.output.weight" not in codes_of(tied)
    assert tied.head.language is not None
    assert untied.head.language is not None
    assert isinstance(untied.head.language.output, QuantizedLinear)


def test_layers_that_share_weights_share_codes():
    model = drawn("albert")
    quantised = lathe.quantize(model, bits=4, calibrate=text(model))
    assert len([name for name in codes_of(quantised) if ".attention." in name]) == 4
    assert moved(logits(model), logits(quantised)) < 0.35


def test_what_no_family_holds_is_quantised_and_reloaded_in_lathes_own_form(tmp_path: Path):
    model = drawn("llama", d_embed=32)  # a factorised table
    quantised = lathe.quantize(model)
    assert not quantised.save(tmp_path / "q").stock
    assert torch.equal(logits(lathe.load(tmp_path / "q")), logits(quantised))


def test_a_resized_and_a_merged_model_are_quantised(tmp_path: Path):
    from lathe.adapt import LoraSettings, add_lora

    model = drawn("t5")
    smaller = lathe.resize(model, d_ff=64, calibrate=text(model))
    assert moved(logits(smaller), logits(lathe.quantize(smaller))) < 0.1
    add_lora(model, LoraSettings(rank=4), seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up") and "adapters" in name:
                parameter.normal_(std=0.1)
    assert moved(logits(model), logits(lathe.quantize(model))) < 0.1


def test_gptq_beats_rounding_on_the_text_it_saw():
    torch.manual_seed(0)
    weight, mix = torch.randn(48, 64), torch.randn(64, 64) * torch.logspace(0, -2, 64)
    x = torch.randn(600, 64) @ mix
    moments = x.T @ x
    grid = choose_grid(weight, bits=4, group_size=32, symmetric=True)
    plain, made = nearest(weight, grid), gptq(weight, moments, grid)
    by_hand = float((x @ (made.dequantized() - weight).T).norm() / (x @ weight.T).norm())
    assert output_error(weight, made, moments) == pytest.approx(by_hand, rel=1e-3)
    assert by_hand < 0.75 * output_error(weight, plain, moments)
    assert int(made.codes_OI.min()) >= -8
    assert int(made.codes_OI.max()) <= 7


def test_an_input_that_is_always_zero_is_no_obstacle():
    weight, x = torch.randn(8, 32), torch.randn(100, 32)
    x[:, 5] = 0
    made = gptq(weight, x.T @ x, choose_grid(weight, bits=4, group_size=0, symmetric=False))
    assert output_error(weight, made, x.T @ x) < 0.3
    assert torch.isfinite(made.dequantized()).all()


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
def test_no_weight_is_further_from_its_code_than_half_a_step(bits: int, symmetric: bool):
    weight = torch.randn(6, 64)
    weight[2] = 0.0
    weight[3] = weight[3].abs()
    made: Codes = nearest(weight, choose_grid(weight, bits=bits, group_size=32, symmetric=symmetric))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, scales = made.codes_OI, made.scales_OG.repeat_interleave(32, 1)
    inside = (codes > low + 1) & (codes < high)  # beyond the ends a weight may be clamped
    assert (((made.dequantized() - weight).abs() / scales)[inside] <= 0.5 + 1e-3).all()
    assert made.dequantized()[2].abs().max() == 0


def test_text_makes_four_bits_better_and_layers_pass_it_in_order():
    model = drawn("t5")
    plain = lathe.quantize(model, bits=4)
    fitted = lathe.quantize(model, bits=4, calibrate=text(model))
    batch = text(model)[0]
    with torch.no_grad():
        wanted, one, other = (each(**batch).logits for each in (model, plain, fitted))
    assert moved(wanted, other) < 0.9 * moved(wanted, one)


def test_kept_layers_are_left_alone():
    quantised = lathe.quantize(drawn("llama"), keep=["decoder.attention.0", "decoder.feed_forward.*.up"])
    names = codes_of(quantised)
    assert not [name for name in names if name.startswith("decoder.attention.0.") or name.endswith("up.weight")]
    assert "decoder.attention.1.q.weight" in names


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"bits": 5}, "bits=5: expected one of 8, 4"),
        ({"group": 48}, "group=48: expected one of 0, 32, 64, 128"),
        ({"tables": 3}, "tables=3"),
        ({"method": "awq"}, "method=awq"),
        ({"method": "gptq"}, "give --calibrate"),
        ({"bits": 4, "activations": "int8"}, "bits=8"),
        ({"keep": ["decoder.atention.0"]}, "matches no layer"),
        ({"keep": ["*"]}, "nothing is left"),
    ],
)
def test_requests_that_cannot_be_are_one_line(how: dict[str, Any], says: str):
    with pytest.raises(RequestError) as error:
        lathe.quantize(drawn("llama"), **how)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quantised_model_is_not_quantised_resized_healed_or_planned_again(tmp_path: Path):
    from lathe.checkpoint.load import open_checkpoint, read_architecture

    model = drawn("llama")
    quantised = lathe.quantize(model)
    quantised.save(tmp_path / "q")
    for refused in (
        lambda: lathe.quantize(quantised),
        lambda: lathe.resize(quantised, d_ff=64),
        lambda: read_architecture(tmp_path / "q"),
        lambda: open_checkpoint(tmp_path / "q"),
    ):
        with pytest.raises(RequestError, match="quantised already"):
            refused()


def test_too_little_text_is_refused():
    model = drawn("llama")
    with pytest.raises(RequestError, match="9 tokens"):
        lathe.quantize(model, bits=4, calibrate=[inputs(model, rows=1)])


def test_damaged_files_are_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    lathe.quantize(drawn("llama"), bits=4, symmetric=False).save(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    name = "decoder.feed_forward.0.up"
    for change, says in (
        ({f"{name}.weight_shape": None}, "weight_shape is missing"),
        ({f"{name}.weight_scale": tensors[f"{name}.weight_scale"][:, :1]}, "weight_scale has shape"),
        ({f"{name}.weight_scale": None}, "weight_scale beside it"),
        ({f"{name}.weight_zero_point": None}, "weight_zero_point is missing"),
    ):
        save_file({k: v.contiguous() for k, v in {**tensors, **change}.items() if v is not None}, file)
        with pytest.raises(RequestError, match=says):
            lathe.load(tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "gptq"}, "quantised with gptq"),
        ({"config_groups": {}}, "no config_groups"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}}, "num_bits=3"),
    ],
)
def test_schemes_of_others_that_lathe_does_not_have_are_named(change: dict[str, Any], says: str, tmp_path: Path):
    lathe.quantize(drawn("llama")).save(tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= change
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RequestError, match=says):
        lathe.load(tmp_path / "q")


def test_targets_by_class_name_are_read(tmp_path: Path):
    quantised = lathe.quantize(drawn("llama", tied=False), tables=16)
    quantised.save(tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["lm_head"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits(lathe.load(tmp_path / "q")), logits(quantised))


def test_a_model_in_half_precision_is_quantised():
    model = drawn("llama").to(torch.bfloat16)
    quantised = lathe.quantize(model)
    assert logits(quantised).dtype == torch.bfloat16
    assert moved(logits(model).float(), logits(quantised).float()) < 0.1
