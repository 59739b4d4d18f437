"""`lathe encode` and `lathe classify`: what they write and print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lathe
from tests.generate.test_encode import model_of

TEXTS = ["to be or not to be", "that", "is the question"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, and texts for it."""
    path = tmp_path_factory.mktemp("encode")
    model_of("classifier").save(path / "model")
    (path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return path


def test_vectors_are_written_in_the_order_of_the_file(cli, folder: Path) -> None:
    out = folder / "vectors.npy"
    words = (folder / "model", "--file", folder / "texts.txt", "--out", out, "--pool", "first", "--json")
    assert json.loads(cli("encode", *words).out)["shape"] == [3, 16]
    expected = lathe.encode(lathe.load(folder / "model"), TEXTS, "first")
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected)
    again = cli("encode", *words)
    assert (again.code, again.out) == (2, "")
    assert again.err.endswith("already exists: choose another name, or remove it\n")


def test_labels_are_printed_a_line_each(cli, folder: Path) -> None:
    words = (folder / "model", "--file", folder / "texts.txt")
    labels = lathe.classify(lathe.load(folder / "model"), TEXTS)
    lines = cli("classify", *words).out.splitlines()
    assert lines == [f"{each.label}\t{each.probabilities[each.number]:.3f}\t{each.text}" for each in labels]
    found = json.loads(cli("classify", *words, "--json").out)["texts"]
    assert [each["number"] for each in found] == [each.number for each in labels]


def test_a_blank_line_would_shift_what_follows_and_is_refused(cli, folder: Path) -> None:
    (folder / "gap.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    for words in (("encode", folder / "model", "--out", folder / "gap.npy"), ("classify", folder / "model")):
        ran = cli(*words, "--file", folder / "gap.txt")
        assert (ran.code, ran.out) == (2, "")
        assert "gap.txt, line 2 is blank" in ran.err
    assert not (folder / "gap.npy").exists()


def test_bad_requests_write_nothing(cli, folder: Path) -> None:
    for more, message in (
        (["--out", folder / "x.txt"], "expected a name that ends in .npy"),
        (["--out", folder / "x.npy", "--pool", "max"], "--pool max: expected mean, first, pooled"),
        (["--out", folder / "x.npy", "--device", "nowhere"], "--device nowhere"),
    ):
        ran = cli("encode", folder / "model", "--file", folder / "texts.txt", *more)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err
    assert not (folder / "x.npy").exists()
