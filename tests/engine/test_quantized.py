"""Models in codes through the native step: the layers' own codes, and float layers that a precision packs."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lathe
from lathe.architecture import Architecture
from lathe.engine import Engine, native, pack
from lathe.engine.engine import PRECISIONS
from lathe.model.transformer import Transformer
from lathe.quantization.nearest import choose_grid, nearest
from lathe.quantization.place import install
from lathe.quantization.settings import QuantizeSettings, choose_targets
from tests.engine.test_engine import close, drawn_model, instruction_sets
from tests.strategies import EOS, architectures

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@settings(max_examples=30, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    architectures(shapes=("decoder", "both"), language=True, max_layers=2),
    st.integers(0, 99),
    st.sampled_from(instruction_sets()),
    st.sampled_from([(8, 0, True), (8, 0, False), (8, 32, True), (4, 32, True), (4, 0, False)]),
    st.sampled_from([8, 4, 16]),
)
def test_codes_are_read_as_they_are(
    architecture: Architecture, seed: int, instructions: str, how: tuple[int, int, bool], tables: int
) -> None:
    """Weight-only codes stand for a float matrix, so the same tolerance holds as in float."""
    model = drawn_model(architecture, seed)
    bits, group, symmetric = how
    asked = QuantizeSettings(bits=bits, group=group, symmetric=symmetric, activations="none", tables=tables)
    in_codes(model, asked)
    engine = Engine(model, instructions=instructions)
    assert engine.native, engine.reason
    ids_BT = torch.randint(0, architecture.embedding.vocab_size, (2, 5), generator=torch.Generator().manual_seed(seed))
    ids_BT[:, -1] = EOS
    batch: dict[str, Any] = {"input_ids": ids_BT}
    if model.encoder is not None:
        batch["decoder_input_ids"] = ids_BT
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        theirs, true = model(**batch), exact(**batch)
    close(engine(**batch).logits, theirs.logits, true.logits)


def in_codes(model: Transformer, asked: QuantizeSettings) -> None:
    codes = {}
    for target in choose_targets(model.architecture, asked):
        weight_OI = model.get_parameter(target.name).detach()
        grid = choose_grid(weight_OI, bits=target.bits, group_size=target.group_size, symmetric=target.symmetric)
        codes[target.name] = dataclasses.replace(nearest(weight_OI, grid), activations=target.activations)
    install(model, codes)


def small(**sizes: Any) -> Transformer:
    """A decoder wide enough that rounding of single numbers evens out."""
    shape = lathe.preset("gpt2").with_({"tokens.eos": [], "tokens.bos": None})
    widths = {"d_model": 96, "d_ff": 200, "n_layers": 2, "n_heads": 4, "d_head": 24, "vocab_size": 130}
    return Transformer(shape.with_({**widths, **sizes}), seed=0).eval()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 40])
def test_int8_activations_are_rounded_as_the_layer_rounds_them(rows: int) -> None:
    """The same whole numbers are summed; what differs is a last digit, and now and then a number that it rounds."""
    model = small()
    float_logits = model(torch.arange(rows)[None]).logits.detach()
    in_codes(model, QuantizeSettings(bits=8, tables=8))
    with torch.no_grad():
        theirs = model(torch.arange(rows)[None]).logits
    for instructions in instruction_sets():
        ours = Engine(model, instructions=instructions)(torch.arange(rows)[None]).logits
        assert ours is not None
        assert distance(ours, theirs) < distance(float_logits, theirs) / 4


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.03), ("int4", 0.3)])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_float_model_is_packed_to_a_precision(precision: str, most: float, rows: int) -> None:
    model = small()
    exact = model(torch.arange(rows)[None]).logits.detach()
    found = []
    for instructions in instruction_sets():
        engine = Engine(model, precision, instructions=instructions)
        assert engine.native, engine.reason
        logits = engine(torch.arange(rows)[None]).logits
        assert logits is not None
        assert 0 < distance(logits, exact) < most
        found.append(logits)
    for each in found[1:]:
        assert distance(each, found[0]) < most / 4


def test_int4_rounds_to_the_nearest_code_of_each_group() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(45, 75, generator=generator)
    weight_OI[7, 32:64] = 0
    made, held = pack.matrix(weight_OI, None, "int4", 1)
    codes_OI, scales_OG = _unpacked(held[0], made.outputs, made.inputs), _by_output(held[1], made.outputs)
    wide_OGI = torch.nn.functional.pad(weight_OI, (0, 21)).view(45, 3, 32)
    peak_OG = wide_OGI.gather(2, wide_OGI.abs().argmax(2, keepdim=True))[..., 0]
    assert torch.equal(scales_OG, (peak_OG / -8).bfloat16())
    inverse_OG1 = torch.where(scales_OG == 0, 1.0, 1 / scales_OG.float())[..., None]
    nearest_OI = (wide_OGI * inverse_OG1).round().clamp(-8, 7).flatten(1)[:, :75]
    assert torch.equal(codes_OI, nearest_OI)


def _unpacked(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The codes of packed nibbles, O × I, as `kernels_whole.h` lays them down."""
    words_PKO4 = panels.view(-(-outputs // 32), -(-inputs // 8), 32, 4)
    both = torch.stack([words_PKO4 & 15, words_PKO4 >> 4], dim=3).float() - 8
    return both.permute(0, 2, 1, 3, 4).reshape(-1, 8 * (-(-inputs // 8)))[:outputs, :inputs]


def _by_output(scales: torch.Tensor, outputs: int) -> torch.Tensor:
    panels = -(-outputs // 32)
    return scales.view(panels, -1, 32).transpose(1, 2).reshape(panels * 32, -1)[:outputs]


def test_a_packed_step_reads_fewer_bytes() -> None:
    model = small(vocab_size=2000)
    by_precision = {each: Engine(model, each).step_bytes for each in PRECISIONS}
    assert by_precision["int8"] < 0.3 * by_precision["float32"]
    assert by_precision["int4"] < 0.7 * by_precision["int8"]
