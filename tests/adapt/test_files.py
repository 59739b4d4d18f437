"""PEFT's files in and out, held against `peft` itself, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lathe
from lathe.adapt import LoraSettings, adapter_names, add_lora, load_adapter, merge, save_adapter
from lathe.errors import RequestError
from tests.adapt.twins import STOCK, adapted, disturb, logits, opened, stock

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", STOCK)
def test_a_peft_adapter_computes_the_same_here_and_after_it_is_written_again(
    family: str, kind: str, tmp_path: Path
) -> None:
    base = stock(family)
    theirs = adapted(base, STOCK[family].targets, **KINDS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lathe.load(base)
    load_adapter(ours, tmp_path / "theirs")
    assert (logits(base) - logits(ours)).abs().max() > 1e-3
    close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    stored, written = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    close(logits(opened(base, tmp_path / "ours")), logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", STOCK)
def test_an_adapter_made_here_opens_in_peft(family: str, kind: str, tmp_path: Path) -> None:
    base, settings = stock(family), KINDS[kind]
    ours = lathe.load(base)
    on: dict[str, Any] = {name.removeprefix("use_"): value for name, value in settings.items()}
    add_lora(ours, LoraSettings(rank=3, alpha=5.0, targets="reader:heads,ffn", **on))
    disturb(ours)
    save_adapter(ours, tmp_path / "ours")
    assert (logits(base) - logits(ours)).abs().max() > 1e-3
    close(logits(opened(base, tmp_path / "ours")), logits(ours))
    back = lathe.load(base)
    load_adapter(back, tmp_path / "ours", name="back")
    close(logits(back), logits(ours))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_adapter_on_everything_opens_in_peft(family: str, tmp_path: Path) -> None:
    base = stock(family)
    ours = lathe.load(base)
    add_lora(ours, LoraSettings(rank=2, targets="all-linear,head.*" if family == "bert" else "all-linear"))
    disturb(ours)
    save_adapter(ours, tmp_path / "ours")
    close(logits(opened(base, tmp_path / "ours")), logits(ours))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("parts", ["q", "qv", "qkv"])
def test_layers_of_a_fused_module_that_share_no_a_are_written_as_blocks(parts: str, dora: bool, tmp_path: Path) -> None:
    base = stock("gpt2")
    ours = lathe.load(base)
    targets = ",".join(f"*.attention.*.{part}" for part in parts)
    add_lora(ours, LoraSettings(rank=3, targets=targets, dora=dora))
    disturb(ours)
    save_adapter(ours, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert written["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (3 * len(parts), 24)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    close(logits(opened(base, tmp_path / "ours")), logits(ours))


def test_layers_of_a_fused_module_go_on_sharing_their_a(tmp_path: Path) -> None:
    base = stock("gpt2")
    adapted(base, ["c_attn"]).save_pretrained(tmp_path / "theirs")
    ours = lathe.load(base)
    load_adapter(ours, tmp_path / "theirs")
    modules: list[Any] = [ours.get_submodule(f"decoder.attention.0.{part}") for part in "qkv"]
    layers = [module.adapters["default"] for module in modules]
    assert layers[0].down is layers[1].down is layers[2].down
    # A for each of two layers, and three B's each.
    assert sum(p.requires_grad for p in ours.parameters()) == 2 * (1 + 3)


def test_ranks_and_alphas_of_single_modules_are_kept(tmp_path: Path) -> None:
    base = stock("llama")
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    theirs = adapted(base, ["q_proj", "down_proj"], **patterns)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lathe.load(base)
    load_adapter(ours, tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    close(logits(opened(base, tmp_path / "ours")), logits(theirs))


def test_a_pattern_is_for_the_name_that_the_adapter_s_own_model_had(tmp_path: Path) -> None:
    """`^` holds on to the beginning of a name, which a class without a head has no prefix in front of."""
    whole = stock("bert")
    patterns = {"alpha_pattern": {"^encoder.layer.0.attention.self.query": 64}}
    theirs = adapted(whole.base_model, ["query"], **patterns)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lathe.load(whole)
    load_adapter(ours, tmp_path / "theirs")
    layers: list[Any] = [ours.get_submodule(f"encoder.attention.{layer}.q") for layer in (0, 1)]
    asked = theirs.peft_config["default"]
    assert [layer.adapters["default"].scale for layer in layers] == [64 / asked.r, asked.lora_alpha / asked.r]


def test_parts_of_one_stock_module_are_adapted_or_trained_whole_but_not_both() -> None:
    ours = lathe.load(stock("gpt2"))
    with pytest.raises(RequestError, match=r"attention.0.v is among targets and .*0.q among whole, .* \(.*c_attn\)"):
        add_lora(ours, LoraSettings(rank=2, targets="*.attention.*.v", whole="*.attention.*.q"))
    assert not any(".adapters." in name for name, _ in ours.named_parameters())


def test_an_adapter_of_some_layers_alone(tmp_path: Path) -> None:
    base = stock("bert")
    theirs = adapted(base, ["query", "key"], layers_to_transform=[1], exclude_modules=["key"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lathe.load(base)
    assert load_adapter(ours, tmp_path / "theirs") == ("encoder.attention.1.q",)
    close(logits(ours), logits(theirs))


def test_a_class_without_a_head_takes_the_adapter_of_one_with(tmp_path: Path) -> None:
    base = stock("gpt2")
    adapted(base, ["c_attn"]).save_pretrained(tmp_path / "theirs")
    body, whole = lathe.load(base.transformer), lathe.load(base)
    for model in (body, whole):
        load_adapter(model, tmp_path / "theirs")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        close(body(ids).last_hidden_state, whole(ids).last_hidden_state)


def test_a_merged_model_is_a_stock_checkpoint(tmp_path: Path) -> None:
    base = stock("t5")
    theirs = adapted(base, ["q", "o"], use_dora=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lathe.load(base)
    load_adapter(ours, tmp_path / "theirs")
    merge(ours)
    ours.save(tmp_path / "merged")
    plain = type(base).from_pretrained(tmp_path / "merged").eval()
    assert plain.state_dict().keys() == base.state_dict().keys()
    close(logits(plain), logits(theirs))


def test_an_architecture_of_no_family_keeps_its_adapters_under_our_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = lathe.preset("t5-small").with_(d_model=24, d_ff=32, n_layers=1, vocab_size=64, d_embed=8)
    ours = lathe.Model(tiny, seed=0)
    add_lora(ours, LoraSettings(rank=2))
    disturb(ours)
    save_adapter(ours, tmp_path / "a")
    assert "own names" in caplog.text
    back = lathe.Model(tiny, seed=0)
    load_adapter(back, tmp_path / "a")
    ids = torch.tensor([[4, 5]])
    assert torch.equal(back(ids, labels=ids).logits, ours(ids, labels=ids).logits)


# --- files that do not fit -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's files for the GPT-2 twin."""
    ours = lathe.load(stock("gpt2"))
    add_lora(ours, LoraSettings(rank=2, targets="reader:heads"))
    return save_adapter(ours, tmp_path / "adapter")


def refused(folder: Path, **changes: Any) -> str:
    """The line with which an adapter is refused, for a GPT-2 twin with other sizes; the model stays as it was."""
    model = lathe.load(stock("gpt2"))
    if changes:
        model = lathe.Model(model.architecture.with_(changes), seed=0)
    before = list(model.state_dict())
    with pytest.raises(RequestError) as error:
        load_adapter(model, folder)
    assert adapter_names(model) == ()
    assert list(model.state_dict()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_of_another_width_is_refused(folder: Path) -> None:
    assert "has shape (2, 24)" in refused(folder, d_model=32, d_head=16)


def test_an_adapter_of_another_depth_is_refused(folder: Path) -> None:
    assert "holds nothing for 'transformer.h.2.attn.c_attn'" in refused(folder, n_layers=3)
    assert "belongs to no linear layer" in refused(folder, n_layers=1)


def test_an_adapter_of_another_rank_than_its_config_says_is_refused(folder: Path) -> None:
    edit(folder, r=3)
    assert "has shape (2, 24)" in refused(folder)


def test_a_half_of_an_adapter_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "h.1.attn.c_attn.lora_B" not in name}, path)
    assert "lora_B.weight is missing" in refused(folder)


def test_dora_without_its_lengths_is_refused(folder: Path) -> None:
    edit(folder, use_dora=True)
    assert "lora_magnitude_vector is missing" in refused(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["wte"]}, "modules_to_save=['wte']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"target_modules": None}, "target_modules=None"),
        ({"rank_pattern": {"c_attn": 0}}, "rank_pattern="),
    ],
)
def test_settings_that_cannot_be_had_are_refused(folder: Path, values: dict[str, Any], says: str) -> None:
    edit(folder, **values)
    assert says in refused(folder)


def test_settings_that_are_off_are_passed_over(folder: Path) -> None:
    edit(folder, a_setting_of_tomorrow=None, another=False)
    assert load_adapter(lathe.load(stock("gpt2")), folder)


def test_missing_and_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "holds no adapter_config.json" in refused(tmp_path / "nowhere")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors" in refused(folder)
    weights.unlink()
    assert "holds no adapter_model.safetensors" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused(folder)


def test_a_destination_that_exists_is_refused(folder: Path) -> None:
    ours = lathe.load(stock("gpt2"))
    add_lora(ours, LoraSettings(rank=2))
    before = (folder / "adapter_config.json").read_text()
    with pytest.raises(RequestError, match="exists"):
        save_adapter(ours, folder)
    assert (folder / "adapter_config.json").read_text() == before
    save_adapter(ours, folder, replace=True)
    assert (folder / "adapter_config.json").read_text() != before


@pytest.mark.parametrize("bits", [None, 8])
def test_a_copy_of_the_bases_own_head_is_passed_over(bits: int | None, tmp_path: Path) -> None:
    base = stock("llama")
    theirs = adapted(base, ["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path / "theirs")
    assert any("base_layer" in name for name in load_file(tmp_path / "theirs/adapter_model.safetensors"))
    ours = lathe.load(base)
    with torch.no_grad():
        ours.get_parameter("head.language.output.weight").add_(5.0)
    other = ours if bits is None else lathe.quantize(ours, bits=bits)
    with pytest.raises(RequestError, match="give the base that it was trained on"):
        load_adapter(other, tmp_path / "theirs")
    assert adapter_names(other) == ()
    same = lathe.load(base) if bits is None else lathe.quantize(lathe.load(base), bits=bits)
    load_adapter(same, tmp_path / "theirs")
    if bits is None:
        close(logits(same), logits(theirs))


def test_a_copy_of_the_bases_head_may_be_of_another_type(tmp_path: Path) -> None:
    base = stock("llama").bfloat16()
    adapted(base, ["lm_head"]).save_pretrained(tmp_path / "theirs")
    wide = lathe.load(base).float()
    assert load_adapter(wide, tmp_path / "theirs") == ("head.language.output",)
    assert adapter_names(wide) == ("default",)
