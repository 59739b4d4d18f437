from __future__ import annotations

import pytest
from hypothesis import given, settings

from lathe.architecture import Architecture
from lathe.blueprint import COMPONENTS, Parameter, blueprint, count, stored
from lathe.presets import names, preset
from tests.strategies import architectures

ROLES = ("table", "writer", "reader", "scale", "shift", "constant")


@settings(max_examples=20)
@given(architectures())
def test_every_parameter_has_a_name_of_its_own_and_known_words(architecture: Architecture) -> None:
    parameters = blueprint(architecture)
    listed = [p.name for p in parameters]
    assert len(set(listed)) == len(listed)
    assert {p.component for p in parameters} <= set(COMPONENTS)
    assert {p.role for p in parameters} <= set(ROLES)


@settings(max_examples=20)
@given(architectures())
def test_dimensions_of_one_group_have_one_size_and_one_unit(architecture: Architecture) -> None:
    seen: dict[str, tuple[int, int]] = {}
    for parameter in blueprint(architecture):
        for axis in parameter.axes:
            assert seen.setdefault(axis.group, (axis.size, axis.unit)) == (axis.size, axis.unit), axis.group
            assert axis.size % axis.unit == 0


@settings(max_examples=20)
@given(architectures())
def test_a_norm_that_a_parameter_names_exists_and_stands_on_the_axis_it_reads(architecture: Architecture) -> None:
    parameters = {p.name: p for p in blueprint(architecture)}
    for parameter in parameters.values():
        if parameter.norm is not None:
            norm = parameters[f"{parameter.norm}.weight"]
            assert norm.role == "scale"
            if len(parameter.axes) == 2:
                assert norm.axes[0].size == parameter.axes[-1].size


@settings(max_examples=20)
@given(architectures())
def test_a_tied_parameter_is_the_tensor_that_it_names(architecture: Architecture) -> None:
    parameters = {p.name: p for p in blueprint(architecture)}
    for parameter in parameters.values():
        if parameter.tied_to is not None:
            assert parameters[parameter.tied_to].shape == parameter.shape
            assert parameters[parameter.tied_to].tied_to is None


@settings(max_examples=20)
@given(architectures())
def test_readers_read_the_stream_and_writers_write_it(architecture: Architecture) -> None:
    inner = {"ffn", "heads", "kv_heads"}
    for parameter in blueprint(architecture):
        if len(parameter.axes) == 2 and parameter.component in ("attention", "cross_attention", "feed_forward"):
            into, out = parameter.axes[-1].name, parameter.axes[0].name
            assert (into == "residual" and out in inner) == (parameter.role == "reader")
            assert (out == "residual" and into in inner) == (parameter.role == "writer")


@settings(max_examples=20)
@given(architectures())
def test_constants_are_stored_and_not_counted(architecture: Architecture) -> None:
    everything = sum(p.size for p in stored(architecture))
    constants = sum(p.size for p in stored(architecture) if not p.trained)
    assert count(architecture) == everything - constants


@settings(max_examples=20)
@given(architectures())
def test_sharing_keeps_fewer_weights_and_never_more(architecture: Architecture) -> None:
    apart = architecture.with_(sharing="none")
    assert count(architecture) <= count(apart)
    assert {p.shape for p in stored(architecture)} == {p.shape for p in stored(apart)}


@pytest.mark.parametrize("name", names())
def test_a_preset_has_every_component_that_it_should(name: str) -> None:
    architecture = preset(name)
    components = {p.component for p in stored(architecture)}
    assert ("cross_attention" in components) == (architecture.encoder is not None and architecture.decoder is not None)
    assert {"token_embedding", "attention", "feed_forward", "norms"} <= components


def test_grouped_heads_have_an_axis_group_of_their_own() -> None:
    parameters = {p.name: p for p in blueprint(preset("llama-3-8b"))}
    q, k, v = (parameters[f"decoder.attention.0.{name}.weight"].axes[0] for name in "qkv")
    assert k.group == v.group != q.group
    assert (q.size, k.size, k.unit) == (4096, 1024, 128)


def test_ungrouped_heads_are_kept_or_cut_together() -> None:
    parameters = {p.name: p for p in blueprint(preset("gpt2"))}
    groups = {parameters[f"decoder.attention.0.{name}.weight"].axes[0].group for name in "qkv"}
    assert len(groups) == 1


def test_a_bias_goes_with_its_weight() -> None:
    def named(name: str) -> Parameter:
        return next(p for p in blueprint(preset("gpt2")) if p.name == name)

    assert named("decoder.attention.0.q.bias").is_bias
    assert named("decoder.attention.0.o.bias").role == "writer"
    assert not named("decoder.norm.bias").is_bias


def test_the_largest_preset_is_listed_whole() -> None:
    assert len(blueprint(preset("llama-3.1-405b"))) == 1 + 126 * 9 + 1 + 1
