from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lathe.families import write_config
from lathe.presets import preset

Cli = Callable[..., Any]


def test_a_preset_is_shown_in_one_column(cli: Cli) -> None:
    ran = cli("plan", "llama-3.1-405b")
    assert (ran.code, ran.err) == (0, "")
    assert "405,853,388,800" in ran.out
    assert "before" not in ran.out


def test_a_change_is_shown_before_and_after_in_80_columns(cli: Cli) -> None:
    ran = cli("plan", "t5-large", "d_model=512", "--tokens", "40M")
    assert ran.code == 0
    assert "737,668,096" in ran.out
    assert "368,834,560" in ran.out
    assert "very high" in ran.out
    assert max(len(line) for line in ran.out.splitlines()) <= 80


def test_the_last_line_is_the_command_that_answers_everything(cli: Cli) -> None:
    last = cli("plan", "t5-large", "d_model=512").out.splitlines()[-1]
    assert last == "lathe plan t5-large d_model=512 n_heads=8 d_ff=2048"
    assert "Proposed" not in cli(*last.split()[1:]).out


def test_the_command_has_the_options_and_can_be_pasted(cli: Cli, tmp_path: Path) -> None:
    options = ["--tokens", "40M", "--batch", "2", "--flops-per-second", "100G"]
    last = cli("plan", "gpt2", "d_model=512", *options).out.splitlines()[-1]
    assert last == "lathe plan gpt2 d_model=512 n_heads=8 d_ff=2048 --tokens 40M --batch 2 --flops-per-second 100G"
    place = tmp_path / "two words.json"
    place.write_text(preset("gpt2").to_json(), encoding="utf-8")
    last = cli("plan", place, "d_model=512", "tokens.eos=[1,2]").out.splitlines()[-1]
    assert shlex.split(last) == [
        "lathe",
        "plan",
        str(place),
        "d_model=512",
        "tokens.eos=[1,2]",
        "n_heads=8",
        "d_ff=2048",
    ]


def test_json_is_one_object_with_both_sides(cli: Cli) -> None:
    answer = json.loads(cli("plan", "t5-large", "d_model=512", "--json").out)
    assert answer["model"] == "t5-large"
    assert answer["before"]["parameters"]["total"] == 737_668_096
    assert answer["after"]["parameters"]["total"] == 368_834_560
    for side in ("before", "after"):
        assert sum(answer[side]["parameters"]["by_component"].values()) == answer[side]["parameters"]["total"]
        assert answer[side]["flops"]["decode"]["total"] > 0
        assert answer[side]["memory"]["training"]["total"] > answer[side]["memory"]["inference"]["total"]
    assert answer["proposal"] == {"n_heads": 8, "d_ff": 2048}
    assert {each["about"] for each in answer["consequences"]} >= {"heads", "feed_forward", "head"}


def test_json_without_a_change_has_both_sides_too(cli: Cli) -> None:
    answer = json.loads(cli("plan", "gpt2", "--json").out)
    assert answer["before"] == answer["after"]


def test_a_head_is_chosen_like_a_field(cli: Cli) -> None:
    assert "109,514,298" in cli("plan", "bert-base-uncased", "head=masked").out
    assert "109,482,240" in cli("plan", "bert-base-uncased").out
    assert cli("plan", "bert-base-uncased", "head=masked", "d_model=512").out.splitlines()[-1] == (
        "lathe plan bert-base-uncased head=masked d_model=512 n_heads=8 d_ff=2048"
    )


def test_a_directory_needs_its_config_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(write_config(preset("gpt2-medium"))), encoding="utf-8")
    ran = cli("plan", tmp_path, "d_model=512", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["before"]["parameters"]["total"] == 354_823_168


def test_an_architecture_in_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(preset("t5-small").with_(sharing="all").to_json(), encoding="utf-8")
    assert "not computation" in cli("plan", file).out


def test_options_reach_the_plan(cli: Cli) -> None:
    options = ("--batch", "2", "--length", "64", "--optimizer", "sgd", "--flops-per-second", "100G", "--tokens", "1M")
    answer = json.loads(cli("plan", "gpt2", *options, "--json").out)
    side = answer["after"]
    assert (side["memory"]["batch"], side["memory"]["length"]) == (2, 64)
    assert side["memory"]["training"]["optimizer"] == 0
    assert side["seconds"]["flops_per_second"] == 100_000_000_000
    assert answer["corpus"]["tokens"] == 1_000_000
    assert "one epoch" in cli("plan", "gpt2", *options).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("t5-smal",), "unknown preset 't5-smal': did you mean t5-small"),
        (("zzzz",), "unknown preset 'zzzz'"),
        (("t5-small", "d_model=0"), "d_model=0: expected a whole number from 1"),
        (("t5-small", "d_model=-1"), "d_model=-1: expected a whole number from 1"),
        (("t5-small", "d_model=abc"), "d_model='abc': expected a whole number"),
        (("t5-small", "d_model=1000000000"), "d_model=1000000000: expected a whole number from 1"),
        (("t5-small", "d_model=512.5"), "d_model=512.5: expected a whole number"),
        (("t5-small", "d_model"), "'d_model' sets nothing"),
        (("t5-small", "d_modle=512"), "unknown field 'd_modle'"),
        (("t5-small", "d_model=512", "d_model=256"), "d_model is set twice"),
        (("t5-small", "n_heads=7", "n_kv_heads=2"), "n_kv_heads=2: expected a divisor of n_heads=7"),
        (("t5-small", "head=tail"), "head='tail': t5-small has the heads language"),
        (("t5-small", "--tokens", "lots"), "tokens='lots': expected a count"),
        (("t5-small", "--batch", "0"), "batch=0: expected"),
        (("t5-small", "--length", "abc"), "--length"),
        (("bert-base-uncased", "--length", "513"), "length=513: expected a whole number from 1 to 512"),
        (("t5-small", "--optimizer", "lion"), "optimizer='lion': expected one of"),
        (("t5-small", "--flops-per-second", "fast"), "flops_per_second='fast'"),
        ((), "MODEL"),
        (("no/such/directory/at/all",), "no/such/directory/at/all"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(cli: Cli, words: tuple[str, ...], message: str) -> None:
    ran = cli("plan", *words)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"d_model: 512", "not JSON"),
        (b"[1, 2]", "expected fields of Architecture"),
        (b'{"d_model": 512}', "the field 'embedding' is missing"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_architecture_is_one_line(cli: Cli, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    ran = cli("plan", file)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_head_is_only_a_presets_to_choose(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(preset("gpt2").to_json(), encoding="utf-8")
    ran = cli("plan", file, "head=classification")
    assert ran.code == 2
    assert "only a preset has heads" in ran.err


def _examples() -> list[tuple[str, str]]:
    """The commands that docs/planning.md shows with their output."""
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    return re.findall(r"^```\n\$ lathe (plan .*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_guide_shows_commands() -> None:
    assert len(_examples()) >= 3


@pytest.mark.parametrize(("words", "output"), _examples())
def test_the_guide_shows_what_is_printed(cli: Cli, words: str, output: str) -> None:
    assert cli(*words.split()).out == output


def test_the_largest_plan_loads_neither_torch_nor_rich() -> None:
    script = (
        "import sys\nfrom lathe.cli.main import main\nassert main(['plan', 'llama-3.1-405b']) == 0\n"
        "assert not {'torch', 'numpy', 'rich', 'huggingface_hub', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
