from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.profiler import ProfilerActivity, profile

from lathe.architecture import Architecture
from lathe.blueprint import count, stored
from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.cache import Cache
from lathe.model.transformer import Transformer
from lathe.planner.memory import cache_bytes, checkpoint_bytes, inference_memory, training_memory
from lathe.presets import preset
from lathe.train.loss import objective_loss
from lathe.train.optimiser import make_optimizer
from lathe.train.settings import OptimizerSettings
from tests.strategies import architectures


@settings(max_examples=20)
@given(architectures())
def test_a_float_checkpoint_is_the_bytes_of_its_tensors(architecture: Architecture) -> None:
    state = Transformer(architecture, seed=0).state_dict()
    bytes_of = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in state.values()}
    assert checkpoint_bytes(architecture)["float32"] == sum(bytes_of.values())
    assert checkpoint_bytes(architecture)["bfloat16"] * 2 == checkpoint_bytes(architecture)["float32"]


@given(architectures())
def test_scales_are_what_a_quantised_checkpoint_has_beyond_its_bits(architecture: Architecture) -> None:
    sizes = checkpoint_bytes(architecture)
    matrices = [p for p in stored(architecture) if len(p.axes) == 2]
    numbers, rows = sum(p.size for p in matrices), sum(p.shape[0] for p in matrices)
    assert sizes["bfloat16"] - sizes["int8"] == numbers - 2 * rows
    # Every group of 32 saves 16 of its 32 bytes and pays 2; short rows and odd ends save a little less.
    assert sizes["int8"] - sizes["int4"] <= numbers // 2


def test_quantised_matrices_carry_their_scales() -> None:
    # One matrix of 64 × 96 in int4: half a byte a number, and three 16-bit scales a row.
    architecture = preset("gpt2").with_({"head.language": None}, d_model=64, n_heads=1, d_ff=96, n_layers=1)
    wider = architecture.with_(d_ff=128)
    extra = {dtype: size - checkpoint_bytes(architecture)[dtype] for dtype, size in checkpoint_bytes(wider).items()}
    numbers = 2 * 32 * 64  # of up and down together; up gains 32 rows, down a group of 32 in each of its 64
    assert extra["int8"] == numbers + 32 * 2 + 32 * 2  # and up's bias
    assert extra["int4"] == numbers // 2 + (32 * 2 * 2 + 64 * 2) + 32 * 2


@settings(max_examples=20)
@given(architectures(shapes=("decoder", "both")))
def test_the_cache_is_as_large_as_the_models_own(architecture: Architecture) -> None:
    assert architecture.decoder is not None
    batch, slots, source = 2, 5, 7
    model = Transformer(architecture, seed=0).eval()
    cache = Cache(architecture, batch, slots)
    own = sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers if layer.k is not None and layer.v is not None)
    spare = 1  # the slot that takes the pads
    planned = cache_bytes(architecture)
    assert own == batch * planned.total("float32", slots + spare, 0)
    if architecture.encoder is not None:
        memory = model.encode(torch.full((batch, source), 4))
        ids = torch.full((batch, 1), 4)
        lone = architecture.with_({"head.pooler": None, "head.classifier": None})
        Transformer(lone, seed=0).eval()(decoder_input_ids=ids, encoder_outputs=memory, past_key_values=cache)
        assert cache.nbytes - own == batch * planned.total("float32", 0, source)


def test_an_encoder_keeps_no_cache() -> None:
    assert set(cache_bytes(preset("bert-base-uncased")).per_token.values()) == {0}


def test_grouped_heads_shrink_the_cache() -> None:
    llama = preset("llama-2-7b")
    assert cache_bytes(llama).per_token["bfloat16"] == 2 * 32 * 4096 * 2
    assert cache_bytes(llama.with_(n_kv_heads=8)).per_token["bfloat16"] == 2 * 32 * 1024 * 2


def test_layers_that_share_weights_have_keys_and_values_of_their_own() -> None:
    gpt2 = preset("gpt2")
    assert cache_bytes(gpt2) == cache_bytes(gpt2.with_(sharing="all"))


@pytest.mark.parametrize(("optimizer", "numbers"), [("adamw", 2), ("momentum", 1), ("sgd", 0)])
def test_an_optimiser_remembers_so_many_numbers_a_weight(optimizer: str, numbers: int) -> None:
    small = preset("bart-base")
    memory = training_memory(small, 1, 8, optimizer)
    assert memory.optimizer == numbers * 4 * count(small)
    assert memory.gradients == 4 * count(small)
    assert memory.weights == 4 * (count(small) + 50265)  # and the constants that are added to the logits


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(RequestError, match="optimizer='lion': expected one of adamw, momentum, sgd"):
        training_memory(preset("gpt2"), 1, 8, "lion")


# Small enough to run in a test, and each with another moment as its peak.
_SMALL = {"n_layers": 3, "d_model": 64, "n_heads": 2, "d_head": 32, "d_ff": 192, "vocab_size": 600}
TRAINED = [
    ("gpt2", None, _SMALL, 4, 64),
    ("gpt2", None, {**_SMALL, "dropout": {}}, 4, 64),
    ("gpt2", None, _SMALL, 1, 4),
    ("llama-3-8b", None, {**_SMALL, "n_kv_heads": 1}, 4, 64),
    ("t5-small", None, _SMALL, 4, 64),
    ("flan-t5-small", None, _SMALL, 2, 96),
    ("bert-base-uncased", "masked", _SMALL, 4, 64),
    ("albert-base", "masked", {**_SMALL, "d_embed": 24}, 4, 64),
    ("bart-base", None, _SMALL, 4, 64),
    ("electra-small", "masked", {**_SMALL, "sharing": "all", "d_embed": 24}, 4, 64),
]


def _peak(work: Callable[[], None]) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    current = peak = 0
    for _, change in events:
        current += change
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize(("name", "head", "changes", "batch", "length"), TRAINED)
def test_the_peak_of_a_training_step_is_the_allocators(
    name: str, head: str | None, changes: dict[str, Any], batch: int, length: int
) -> None:
    architecture = preset(name, head).with_(changes)
    model = Transformer(architecture, seed=0).train()
    optimizer = make_optimizer(model, OptimizerSettings())
    ids, labels = torch.full((batch, length), 4), torch.full((batch, length), 5)
    inputs = {"input_ids": ids, "labels": labels}
    if architecture.encoder is not None and architecture.decoder is not None:
        inputs["decoder_input_ids"] = labels.clone()
    made = Batch(inputs, tokens=ids.numel(), targets=labels.numel())

    def step() -> None:
        objective_loss(model, made)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # which makes the moments
    planned = training_memory(architecture, batch, length)
    there = planned.weights + planned.optimizer
    assert planned.total == pytest.approx(there + _peak(step), rel=0.02)
    model.set_checkpointing(True)
    assert planned.total_checkpointed == pytest.approx(there + _peak(step), rel=0.06)


@pytest.mark.parametrize(("name", "head", "changes", "batch", "length"), TRAINED)
def test_the_peak_of_reading_a_prompt_is_near_the_allocators(
    name: str, head: str | None, changes: dict[str, Any], batch: int, length: int
) -> None:
    architecture = preset(name, head).with_(changes)
    model = Transformer(architecture, seed=0).eval()
    ids = torch.full((batch, length), 4)
    inputs: dict[str, Any] = {"input_ids": ids}
    if architecture.encoder is not None and architecture.decoder is not None:
        inputs["decoder_input_ids"] = ids

    def read() -> None:
        cache = None if architecture.decoder is None else Cache(architecture, batch, length)
        with torch.inference_mode():
            model(**inputs, past_key_values=cache)

    planned = inference_memory(architecture, batch, length)
    assert planned.total == pytest.approx(planned.weights + _peak(read), rel=0.15)


def test_checkpointing_never_needs_more() -> None:
    for name in ("gpt2", "t5-large", "albert-xxlarge", "llama-3.1-405b"):
        memory = training_memory(preset(name), 8, 512)
        assert memory.total_checkpointed <= memory.total
