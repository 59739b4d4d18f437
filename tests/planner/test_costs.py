from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from lathe.architecture import Architecture
from lathe.blueprint import COMPONENTS, count
from lathe.model.transformer import Transformer
from lathe.planner.costs import costs, parameters
from lathe.presets import preset
from tests.strategies import architectures


@settings(max_examples=25)
@given(architectures())
def test_parameters_are_those_of_the_built_model(architecture: Architecture) -> None:
    built = sum(p.numel() for p in Transformer(architecture, seed=0).parameters())
    assert parameters(architecture).total == built == count(architecture)


@given(architectures())
def test_the_components_are_the_whole(architecture: Architecture) -> None:
    counted = parameters(architecture)
    assert tuple(counted.by_component) == COMPONENTS
    assert sum(counted.by_component.values()) == counted.total <= counted.as_executed


@given(architectures())
def test_the_record_is_plain_json(architecture: Architecture) -> None:
    plain = costs(architecture, 2, 8).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["parameters"]["total"] == count(architecture)
    assert plain["flops"]["forward"]["total"] == sum(plain["flops"]["forward"]["by_component"].values())
    assert plain["flops"]["training_step"] == 3 * 2 * plain["flops"]["forward"]["total"]


# ALBERT-base with other embeddings and other sharing, in millions (Lan et al. 2020, Tables 3 and 4). At E = 768
# the paper has no lifting matrix. Its shared rows count the pooler; its unshared rows do not: with it they would
# be 88, 90, 94 and 109.
SHARED = [
    (64, "all", 10),
    (128, "all", 12),
    (256, "all", 16),
    (768, "all", 31),
    (128, "attention", 64),
    (768, "attention", 83),
    (128, "ffn", 38),
    (768, "ffn", 57),
]
UNSHARED = [(64, 87), (128, 89), (256, 93), (768, 108)]


def _embedded(d_embed: int) -> int | None:
    return None if d_embed == 768 else d_embed


@pytest.mark.parametrize(("d_embed", "sharing", "millions"), SHARED)
def test_the_papers_shared_alberts(d_embed: int, sharing: str, millions: int) -> None:
    albert = preset("albert-base").with_(d_embed=_embedded(d_embed), sharing=sharing)
    assert round(count(albert) / 1e6) == millions


@pytest.mark.parametrize(("d_embed", "millions"), UNSHARED)
def test_the_papers_unshared_alberts(d_embed: int, millions: int) -> None:
    albert = preset("albert-base", head="none").with_(d_embed=_embedded(d_embed), sharing="none")
    assert round(count(albert) / 1e6) == millions
