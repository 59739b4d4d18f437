"""Requests that cannot be met are refused before a model is read or a file begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lathe.architecture import Classifier, Pooler
from lathe.errors import LatheError, RequestError
from lathe.export import job
from lathe.export.compare import compare, probe
from lathe.export.formats import MODULES, format_of
from tests.export.models import ARCHITECTURES, bert, model


@pytest.fixture(autouse=True)
def _all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "missing", lambda packages: [])


@pytest.mark.parametrize(
    ("path", "to", "kind", "said"),
    [
        ("model", "ggml", None, "'ggml'.*gguf"),
        ("model.gguf", "gguf", "q5_0", "type='q5_0': gguf stores weights as one of f16, f32, q8_0, q4_0"),
        ("model", "onnx", "int8", "onnx stores weights as one of float32"),
        ("model", "gguf", None, "expected a name that ends in .gguf"),
        ("full", "ctranslate2", None, "already exists"),
        ("file", "ctranslate2", None, "is a file, where a directory is to be written"),
        ("dir.gguf", "gguf", None, "is a directory, where a file is to be written"),
        ("there.gguf", "gguf", None, "already exists"),
    ],
)
def test_a_request_that_cannot_be_met_changes_nothing(
    path: str, to: str, kind: str | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "dir.gguf").mkdir()
    for name in ("file", "there.gguf"):
        (tmp_path / name).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=said):
        job.export(model("gpt2"), tmp_path / path, to=to, kind=kind)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.gguf").read_text() == "kept"


@pytest.mark.parametrize("to", MODULES)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "missing", lambda packages: list(packages))
    line = " ".join(package.pip for package in format_of(to).writer)
    with pytest.raises(RequestError, match=f"writing {to} takes what is not installed: pip install {line}$"):
        job.export(model("gpt2"), tmp_path / ("m.gguf" if to == "gguf" else "m"), to=to)


def test_the_body_is_the_model_without_its_heads() -> None:
    labelled = bert().with_({"head.classifier": Classifier(n_labels=3)})
    assert job.without_heads(labelled) == bert()
    marks = bert().with_({"head.pooler": Pooler(token="each"), "head.classifier": Classifier(n_labels=2)})
    assert job.without_heads(marks).head == bert().with_({"head.pooler": None}).head
    with pytest.raises(RequestError, match="this model has neither"):
        job.without_heads(bert())


def test_a_difference_is_measured_by_the_outputs_spread() -> None:
    wanted = [torch.tensor([[0.0, 10.0], [10.0, 0.0]])]
    found = [torch.tensor([[0.0, 10.0], [10.0, 1.0]])]
    difference = compare(wanted, found)
    assert (difference.max_error, difference.agreement, difference.places) == (1.0, 1.0, 2)
    assert difference.relative_error == pytest.approx(0.5 / float(wanted[0].std()))
    with pytest.raises(LatheError, match="not finite"):
        compare(wanted, [torch.full((2, 2), float("nan"))])
    with pytest.raises(LatheError, match="outputs of"):
        compare(wanted, [torch.zeros(2, 3)])


def test_what_both_programs_are_shown_stays_within_the_model() -> None:
    rows = probe(ARCHITECTURES["mistral"])
    assert [len(row) for row in rows] == [5, 12, 11]
    assert all(0 < int(number) < 64 for row in rows for number in row)
