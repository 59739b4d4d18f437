from __future__ import annotations

import doctest
import json
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings

import lathe.architecture
import lathe.blueprint
import lathe.planner
import lathe.presets
from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.planner import plan
from lathe.planner.text import render
from lathe.presets import names, preset
from tests.strategies import MAX_POSITIONS, architectures


@pytest.mark.parametrize("module", [lathe.planner, lathe.presets, lathe.architecture, lathe.blueprint])
def test_the_examples_in_the_docstrings_are_true(module: ModuleType) -> None:
    ran = doctest.testmod(module)
    assert ran.attempted > 0
    assert ran.failed == 0


def test_before_and_after() -> None:
    made = plan("t5-large", d_model=512)
    assert made.before.parameters.total == 737_668_096
    assert made.after.architecture == preset("t5-large").with_(d_model=512)
    assert made.changes == {"d_model": 512}


def test_without_a_change_both_are_the_same() -> None:
    made = plan("gpt2")
    assert made.after is made.before


def test_paths_and_short_names_go_together() -> None:
    made = plan("t5-small", {"encoder.n_layers": 2}, d_ff=1000)
    assert [stack.n_layers for _, stack in made.after.architecture.stacks] == [2, 6]


def test_an_architecture_is_as_good_as_a_name() -> None:
    assert plan(preset("gpt2"), d_model=384).to_dict() == plan("gpt2", d_model=384).to_dict()


def test_a_head_is_chosen_by_name() -> None:
    assert plan("bert-base-uncased", head="masked").before.parameters.total == 109_514_298
    assert plan("bert-base-uncased").before.parameters.total == 109_482_240
    with pytest.raises(RequestError, match="only a preset has heads"):
        plan(preset("gpt2"), head="language")


def test_the_record_is_plain_json_with_what_scripts_read() -> None:
    plain = plan("t5-large", d_model=512, sharing="all", tokens="40M", flops_per_second="100G").to_dict()
    assert json.loads(json.dumps(plain)) == plain
    for side in ("before", "after"):
        assert plain[side]["parameters"]["total"] == sum(plain[side]["parameters"]["by_component"].values())
        assert {"flops", "memory", "cache_bytes", "checkpoint_bytes", "seconds"} <= set(plain[side])
    assert plain["corpus"]["risk"] == "high"
    assert Architecture.from_dict(plain["after"]["architecture"]).d_model == 512


def test_times_are_operations_over_the_speed_that_was_given() -> None:
    made = plan("gpt2", flops_per_second="100G", tokens="1M", batch=4, length=128)
    timing = made.timing_after
    assert timing is not None
    assert timing.decode is not None
    assert made.after.decode is not None
    assert timing.decode == made.after.decode.total / 1e11
    assert timing.training_step == pytest.approx(3 * 4 * made.after.forward.total / 1e11)
    assert timing.epoch == pytest.approx(timing.training_step * 1_000_000 / (4 * 128))
    assert plan("gpt2").timing_after is None


def test_the_length_is_what_the_positions_reach() -> None:
    short = preset("gpt2").with_(max_positions=100)
    assert plan(short).before.length == 100
    assert plan("gpt2").before.length == 512
    assert plan("gpt2", max_positions=64).before.length == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"d_model": 0}, "d_model=0: expected a whole number from 1"),
        ({"d_model": -1}, "d_model=-1: expected"),
        ({"d_model": "abc"}, "d_model='abc': expected a whole number"),
        ({"d_model": 10**9}, "d_model=1000000000: expected a whole number from 1 to"),
        ({"d_modle": 5}, "did you mean 'd_model'"),
        ({"batch": 0}, "batch=0: expected a whole number from 1"),
        ({"batch": 2.5}, "batch=2.5: expected a whole number"),
        ({"length": 2000}, "length=2000: expected a whole number from 1 to 1,024"),
        ({"length": "x"}, "length='x': expected a whole number"),
        ({"tokens": "many"}, "tokens='many': expected a count"),
        ({"flops_per_second": "-1"}, "flops_per_second='-1': expected a count"),
        ({"optimizer": "lion"}, "optimizer='lion': expected one of"),
        ({"head": "tail"}, "head='tail': gpt2 has the heads language"),
    ],
)
def test_a_wrong_request_is_one_line(call: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as raised:
        plan("gpt2", **call)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", names())
def test_every_preset_reads_well_in_80_columns(name: str) -> None:
    made = plan(name, d_model=512, n_layers=12, tokens="3.5T", flops_per_second="312T")
    for text in (str(made), str(plan(name))):
        assert max(len(line) for line in text.splitlines()) <= 80, text


def test_one_column_without_a_change_and_three_with_one() -> None:
    assert "before" not in str(plan("gpt2"))
    lines = str(plan("t5-large", d_model=512)).splitlines()
    assert lines[0].split() == ["│", "before", "│", "after", "│", "change"]
    assert ["Parameters", "737,668,096", "368,834,560", "−50.0%"] in [
        [cell.strip() for cell in line.split("│")] for line in lines
    ]


def test_a_change_of_one_stack_says_which() -> None:
    text = str(plan("t5-small", {"encoder.n_layers": 2}, n_heads=4))
    assert "encoder.n_layers" in text
    assert "encoder n_heads" in text
    assert "decoder n_heads" in text


def test_what_appears_and_what_goes() -> None:
    text = str(plan("gpt2", {"decoder.positions": {"kind": "none"}, "head.language.tied": False}))
    rows = {line.split("│")[0].strip(): line.split("│")[-1].strip() for line in text.splitlines() if "│" in line}
    assert rows["positions"] == "gone"
    assert rows["head"] == "new"


def test_sentences_are_wrapped_where_they_are_told() -> None:
    text = render(plan("t5-large", d_model=512, tokens="40M"), width=60)
    prose = [line for line in text.splitlines() if "│" not in line and "┼" not in line]
    assert max(len(line) for line in prose) <= 60


@settings(max_examples=30)
@given(architectures())
def test_any_architecture_prints(architecture: Architecture) -> None:
    text = str(plan(architecture, d_model=8, tokens=10**6, flops_per_second=1e9))
    assert max(len(line) for line in text.splitlines()) <= 80
    limits = [s.positions.limit for _, s in architecture.stacks if s.positions.limit is not None]
    assert plan(architecture).before.length == (MAX_POSITIONS if limits else 512)
