"""Rows of text are as long as the model reads well, and no longer than documents are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lathe
from lathe.reshape.opening import open_job
from lathe.reshape.request import read_request
from lathe.reshape.row_length import best_length
from lathe.reshape.text import Documents, TextSettings
from lathe.text.train import train_tokenizer

WORDS = ("lathe", "turns", "wood", "metal", "stone", "size", "asked", "quick", "brown", "foxes")
REPEATED = [" ".join([word] * 80) for word in WORDS]


def copies(known: int) -> lathe.Model:
    """A GPT-2 that says each word again, which is right in repetitions, up to a position that it does not know."""
    tokenizer = train_tokenizer(REPEATED, 300, convention="gpt2")
    sizes = {"d_model": 64, "n_layers": 1, "n_heads": 2, "d_head": 32, "d_ff": 16, "max_positions": 128}
    architecture = lathe.preset("gpt2").with_({**sizes, "vocab_size": tokenizer.vocab_size})
    model = lathe.Model(architecture, seed=0, tokenizer=tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".down.weight")):
                parameter.zero_()
        model.get_parameter("embedding.tokens.weight").mul_(100)
        places = model.get_parameter("decoder.input.positions.weight")
        places.zero_()
        places[known:] = 50 * torch.randn(places[known:].shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(("known", "length"), [(128, 128), (64, 64), (32, 32)])
def test_rows_end_where_the_model_stops_reading_well(known: int, length: int):
    model = copies(known)
    assert model.tokenizer is not None
    found = best_length(model, Documents.of(REPEATED), TextSettings(file="-"), model.tokenizer)
    assert found.positions == length
    assert min(found.losses, key=lambda each: found.losses[each]) == length
    assert (f"of {length} tokens" in found.told) == (length < 128)


def test_nothing_is_chosen_where_a_length_is_given_or_documents_are_short():
    model = copies(32)
    assert model.tokenizer is not None
    given = TextSettings(file="-", length=80)
    for settings, texts in ((given, REPEATED), (TextSettings(file="-"), list(WORDS))):
        found = best_length(model, Documents.of(texts), settings, model.tokenizer)
        assert (found.positions, dict(found.losses), found.told) == (settings.length or 128, {}, "")


def test_a_job_has_one_length_for_all_of_its_texts(tmp_path: Path):
    copies(32).save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(REPEATED * 2), encoding="utf-8")
    words = {"d_ff": 8, "calibrate": str(tmp_path / "text.txt"), "heal": str(tmp_path / "text.txt"), "heal.steps": 1}
    job = open_job(read_request(str(tmp_path / "model"), words))
    assert job.request.calibrate is not None
    assert job.request.calibrate.length == 32
    assert [stage["heal"].length for stage in job.stages if "heal" in stage] == [32]
    assert "of 32 tokens" in job.rows
    fixed = open_job(read_request(str(tmp_path / "model"), {**words, "calibrate.length": 100, "heal.length": 50}))
    assert fixed.request.calibrate is not None
    assert (fixed.request.calibrate.length, fixed.rows) == (100, "")
    assert [stage["heal"].length for stage in fixed.stages if "heal" in stage] == [50]
