"""`lathe export` on the command line: the report, JSON, and one line for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lathe.export.formats import format_of, missing
from tests.conftest import Ran
from tests.export.models import model

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "small"
    model("gpt2").save(place)
    return place


def _installed(to: str) -> None:
    form = format_of(to)
    absent = missing((*form.writer, *form.runtime))
    if absent:
        pytest.skip(f"{to} wants {', '.join(dict.fromkeys(package.pip for package in absent))}")


def test_the_report_says_what_was_written_and_how_it_was_verified(cli: Cli, saved: Path, tmp_path: Path) -> None:
    _installed("ctranslate2")
    ran = cli("export", saved, tmp_path / "out", "--to", "ctranslate2")
    assert ran.code == 0, ran.err
    first, *_, last = ran.out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: ctranslate2, float32, ")
    assert last.startswith("verified in CTranslate2 ")
    assert "note: the model has no tokenizer" in ran.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.bin", "vocabulary.json"}


def test_json_is_one_object(cli: Cli, saved: Path, tmp_path: Path) -> None:
    _installed("ctranslate2")
    ran = cli("export", saved, tmp_path / "out", "--to", "ctranslate2", "--type", "int8", "--json")
    answer = json.loads(ran.out)
    assert (answer["format"], answer["type"], answer["not_verified_because"]) == ("ctranslate2", "int8", None)
    assert 0 < answer["verified"]["relative_error"] < 0.3
    assert answer["verified"]["what"] == "logits"
    assert answer["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "onnx"], "it has a decoder, which needs a cache"),
        (["--to", "pickle"], "'pickle'"),
        (["--to", "ctranslate2", "--type", "int3"], "type='int3'"),
        (["--to", "gguf"], "ends in .gguf"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    words: list[str], said: str, cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lathe.export.job.missing", lambda packages: [])
    ran = cli("export", saved, tmp_path / "out", *words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert said in ran.err
    assert list(tmp_path.iterdir()) == []
