from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lathe.architecture import Architecture
from lathe.model.cache import Cache
from lathe.model.transformer import Transformer
from lathe.planner import flops
from lathe.presets import preset
from tests.strategies import EOS, architectures

BATCH, LENGTH, SOURCE = 2, 5, 7


def _counted(model: Transformer, **inputs: object) -> int:
    # torch's counter knows no formula for the CPU's fused attention, but counts the same sum written out.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


def _ids(length: int) -> torch.Tensor:
    ids = torch.full((BATCH, length), 4)
    ids[:, -1] = EOS
    return ids


def _without_pooler(architecture: Architecture) -> Architecture:
    return architecture.with_({"head.pooler": None, "head.classifier": None})


@settings(max_examples=30)
@given(architectures(max_layers=3))
def test_a_forward_pass_is_what_torch_counts(architecture: Architecture) -> None:
    model = Transformer(architecture, seed=0)
    both = architecture.encoder is not None and architecture.decoder is not None
    # A pooler finds its place in the ids of the source, which the decoder then reads as well.
    if both and architecture.head.pooler is None:
        measured = _counted(model, input_ids=_ids(SOURCE), decoder_input_ids=_ids(LENGTH))
        counted = flops.forward(architecture, LENGTH, SOURCE)
    else:
        measured = _counted(model, input_ids=_ids(LENGTH))
        counted = flops.forward(architecture, LENGTH)
    assert BATCH * counted.total == measured


@settings(max_examples=12)
@given(architectures(shapes=("decoder", "both"), max_layers=3))
def test_a_step_of_decoding_is_what_torch_counts(architecture: Architecture) -> None:
    architecture = _without_pooler(architecture)
    model = Transformer(architecture, seed=0)
    cache = Cache(architecture, BATCH, LENGTH)
    inputs: dict[str, object] = {"past_key_values": cache}
    ids = "input_ids"
    if architecture.encoder is not None:
        inputs["encoder_outputs"] = model.encode(_ids(LENGTH))
        ids = "decoder_input_ids"
    _counted(model, **inputs, **{ids: _ids(LENGTH - 1)})
    step = flops.decode(architecture, LENGTH)
    assert step is not None
    assert BATCH * step.total == _counted(model, **inputs, **{ids: _ids(1)})


@settings(max_examples=12)
@given(architectures(shapes=("both",), max_layers=3, language=True))
def test_the_prefill_of_a_source_is_encoding_it_and_one_step(architecture: Architecture) -> None:
    architecture = _without_pooler(architecture)
    model = Transformer(architecture, seed=0)
    measured = _counted(
        model, input_ids=_ids(LENGTH), decoder_input_ids=_ids(1), past_key_values=Cache(architecture, BATCH, LENGTH)
    )
    assert BATCH * flops.prefill(architecture, LENGTH).total == measured


@given(architectures(shapes=("decoder",)))
def test_the_prefill_of_a_prompt_predicts_once(architecture: Architecture) -> None:
    whole, prompt = flops.forward(architecture, LENGTH), flops.prefill(architecture, LENGTH)
    pooler = architecture.head.pooler
    every = pooler is None or pooler.token == "each"
    body = {name: count for name, count in whole.by_component.items() if name != "head"}
    assert body == {name: count for name, count in prompt.by_component.items() if name != "head"}
    if every:
        assert whole.by_component["head"] == LENGTH * prompt.by_component["head"]


@given(architectures(language=True))
def test_sharing_layers_saves_no_computation(architecture: Architecture) -> None:
    apart = architecture.with_(sharing="none")
    assert flops.forward(architecture, LENGTH) == flops.forward(apart, LENGTH)


def test_an_encoder_generates_nothing() -> None:
    assert flops.decode(preset("bert-base-uncased"), 128) is None
    assert flops.prefill(preset("bert-base-uncased"), 128) == flops.forward(preset("bert-base-uncased"), 128)


def test_an_albert_computes_as_much_as_its_shape() -> None:
    albert = preset("albert-base")
    bert = preset("bert-base-uncased")
    assert flops.forward(albert, 512).by_component["attention"] == flops.forward(bert, 512).by_component["attention"]


def test_the_rule_of_two_operations_a_parameter() -> None:
    # 2N a token, N without the look-up table, and the attention on top: Kaplan et al. 2020, §2.1.
    llama = preset("llama-3.1-8b")
    step = flops.decode(llama, 1)
    assert step is not None
    table = 128256 * 4096
    norms = (2 * 32 + 1) * 4096
    assert step.total == 2 * (8_030_261_248 - table - norms) + 32 * 4 * 4096


@pytest.mark.parametrize("length", [1, 512, 4096])
def test_attention_alone_grows_with_the_context(length: int) -> None:
    llama = preset("llama-3.1-8b")
    short, long = flops.decode(llama, length), flops.decode(llama, length + 100)
    assert short is not None
    assert long is not None
    assert long.total - short.total == 100 * 32 * 4 * 4096
