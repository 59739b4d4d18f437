from __future__ import annotations

import pytest

from lathe import presets
from lathe.architecture import Architecture
from lathe.blueprint import count
from lathe.errors import RequestError
from lathe.families import read_config, write_config

# Published counts, unique tensors counted once: (preset, head, parameters). None is the preset's own head.
PUBLISHED = [
    ("t5-small", None, 60_506_624),
    ("t5-base", None, 222_903_552),
    ("t5-large", None, 737_668_096),
    ("t5-3b", None, 2_851_598_336),
    ("t5-11b", None, 11_307_321_344),
    ("flan-t5-small", None, 76_961_152),
    ("flan-t5-base", None, 247_577_856),
    ("flan-t5-large", None, 783_150_080),
    ("flan-t5-xl", None, 2_849_757_184),
    ("flan-t5-xxl", None, 11_135_332_352),
    ("mt5-small", None, 300_176_768),
    ("mt5-base", None, 582_401_280),
    ("mt5-large", None, 1_229_581_312),
    ("bert-base-uncased", "pooled", 109_482_240),
    ("bert-base-uncased", "masked", 109_514_298),
    ("bert-large-uncased", "pooled", 335_141_888),
    ("albert-base", "pooled", 11_683_584),
    ("albert-large", "pooled", 17_683_968),
    ("albert-xlarge", "pooled", 58_724_864),
    ("albert-xxlarge", "pooled", 222_595_584),
    ("albert-base-v2", "pooled", 11_683_584),
    ("electra-small", None, 13_549_057),
    ("electra-small", "none", 13_483_008),
    ("electra-base", "none", 108_891_648),
    ("bart-base", None, 139_420_416),
    ("bart-large", None, 406_291_456),
    ("mbart-large", None, 610_851_840),
    ("gpt2", None, 124_439_808),
    ("gpt2-medium", None, 354_823_168),
    ("gpt2-large", None, 774_030_080),
    ("gpt2-xl", None, 1_557_611_200),
    ("distilgpt2", None, 81_912_576),
    ("llama-2-7b", None, 6_738_415_616),
    ("llama-2-13b", None, 13_015_864_320),
    ("llama-2-70b", None, 68_976_648_192),
    ("llama-3-8b", None, 8_030_261_248),
    ("llama-3.1-8b", None, 8_030_261_248),
    ("llama-3.1-70b", None, 70_553_706_496),
    ("llama-3.1-405b", None, 405_853_388_800),
    ("llama-3.2-1b", None, 1_235_814_400),
    ("llama-3.2-3b", None, 3_212_749_824),
    ("tinyllama-1.1b", None, 1_100_048_384),
    ("mistral-7b", None, 7_241_732_096),
    ("mistral-7b-v0.3", None, 7_248_023_552),
    ("qwen2-0.5b", None, 494_032_768),
    ("qwen2-1.5b", None, 1_543_714_304),
    ("qwen2-7b", None, 7_615_616_512),
]


@pytest.mark.parametrize(("name", "head", "parameters"), PUBLISHED)
def test_the_published_parameter_count(name: str, head: str | None, parameters: int) -> None:
    assert count(presets.preset(name, head)) == parameters


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_an_architecture_with_each_of_its_heads(name: str) -> None:
    for head in presets.heads(name):
        architecture = presets.preset(name, head)
        assert Architecture.from_json(architecture.to_json()) == architecture
        assert architecture.family is not None
    assert presets.preset(name) == presets.preset(name, presets.heads(name)[0])


@pytest.mark.parametrize("name", presets.names())
def test_no_setting_of_a_preset_is_left_at_a_default_by_oversight(name: str) -> None:
    architecture = presets.preset(name)
    for _, stack in architecture.stacks:
        assert stack.positions.kind != "none"
    if architecture.decoder is not None:
        assert architecture.decoder.causal
        assert architecture.tokens.eos


@pytest.mark.parametrize("name", presets.names())
def test_the_stock_config_says_the_same(name: str) -> None:
    for head in presets.heads(name):
        architecture = presets.preset(name, head)
        if head == "none" and architecture.family in ("bert", "albert"):
            continue  # their bare class has a pooler
        back = read_config(write_config(architecture))
        # The mask token is the tokenizer's to know, and no config.json names it.
        assert back == architecture.with_({"tokens.mask": None}), head


def test_a_name_that_is_like_another_is_the_same_architecture() -> None:
    assert presets.preset("flan-t5-xl") == presets.preset("t5-v1_1-xl")
    assert presets.preset("flan-t5-xl") != presets.preset("t5-3b")


def test_a_preset_is_not_changed_by_the_one_before_it() -> None:
    first = presets.preset("qwen2-7b")
    presets.preset("qwen2-0.5b")
    assert presets.preset("qwen2-7b") == first
    assert first.head.language is not None
    assert not first.head.language.tied


def test_llama_31_stretches_its_rotary_frequencies() -> None:
    decoder = presets.preset("llama-3.1-8b").decoder
    assert decoder is not None
    scaling = decoder.positions.scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("llama3", 8.0, 8192)
    assert decoder.positions.max_positions == 131072


@pytest.mark.parametrize("given", ["t5-smal", "google-t5/t5-small", "T5-SMALL", "t5_small"])
def test_an_unknown_name_is_answered_with_what_comes_close(given: str) -> None:
    with pytest.raises(RequestError) as raised:
        presets.preset(given)
    assert "t5-small" in str(raised.value)
    assert len(str(raised.value)) < 200


def test_a_name_that_comes_close_to_nothing_is_answered_with_the_list() -> None:
    with pytest.raises(RequestError, match="expected one of albert-base"):
        presets.preset("zzzz")


def test_an_unknown_head_names_those_there_are() -> None:
    with pytest.raises(RequestError, match="bert-base-uncased has the heads pooled, masked"):
        presets.preset("bert-base-uncased", head="language")
