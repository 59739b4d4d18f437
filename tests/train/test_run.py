"""A run in a directory: killed at any instant it ends as if it had not been; damage and mismatch are named."""

from __future__ import annotations

import json
import logging
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.checkpoint.digest import digest_file
from lathe.checkpoint.tensors import open_tensors
from lathe.data import Batch, Batches
from lathe.errors import LatheError, RequestError
from lathe.train import OptimizerSettings, SaveSettings, TrainSettings, objective_loss
from lathe.train.checkpointing import damage
from lathe.train.records import METRICS
from lathe.train.run import fit

KILLS, STEPS = 20, 140


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_tensors(folder) as source:
        return dict(source.items())


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended with the same weights, moments, metrics, order and position."""
    assert (one / METRICS).read_bytes() == (other / METRICS).read_bytes()
    for part in ("last", "best", "last/optimizer"):
        wanted, found = tensors(other / "checkpoints" / part), tensors(one / "checkpoints" / part)
        assert list(wanted) == list(found)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    states = [json.loads((run / "checkpoints/last/trainer.json").read_text()) for run in (one, other)]
    for state in states:
        del state["run"]["seconds"], state["lengths"]["speed.jsonl"]
    assert states[0] == states[1]


def test_a_run_killed_twenty_times_ends_as_one_that_was_not(tmp_path: Path):
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "0", str(KILLS), str(STEPS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert ends == [9] * KILLS + [0, 0], done.stderr  # killed by signal 9, and two that ended by themselves
    assert len(metrics(tmp_path / "run")) == STEPS
    assert_same(tmp_path / "run", tmp_path / "whole")


class Setting:
    """A small run that each test varies."""

    def __init__(self, shape: Callable, batches: Callable, folder: Path) -> None:
        self.architecture = shape("gpt2")[0]
        self.data: Callable[[], Batches] = lambda: batches("gpt2")
        self.folder = folder
        self.settings = TrainSettings(steps=6, optimizer=OptimizerSettings(lr=5e-3), evaluate_every=2)
        self.save = SaveSettings(every=2)
        self.validation_batches = 2
        self.model: lathe.Model

    def __call__(self, **more: Any) -> list[int]:
        """Train a fresh model; the steps that were made."""
        self.model, data = lathe.Model(self.architecture, seed=0), self.data()
        more.setdefault("resume", True)
        found = fit(
            self.model,
            data,
            self.settings,
            self.folder,
            write_model=self.model.save,
            save=self.save,
            evaluation=data.one_pass(self.validation_batches),
            **more,
        )
        return [report.step for report in found.steps]

    def stop_after(self, step: int) -> None:
        """Train, and be interrupted after that step."""

        def interrupt(report: lathe.train.StepReport) -> None:
            if report.step == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self(on_step=interrupt)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step}"


@pytest.fixture
def setting(shape: Callable, batches: Callable, tmp_path: Path) -> Setting:
    return Setting(shape, batches, tmp_path / "run")


def test_checkpoints_are_models_and_only_the_newest_and_the_best_stay(setting: Setting):
    assert setting() == [1, 2, 3, 4, 5, 6]
    names = sorted(entry.name for entry in (setting.folder / "checkpoints").iterdir())
    losses = {line["step"]: line["evaluation"]["loss"] for line in metrics(setting.folder) if "evaluation" in line}
    best = min(losses, key=lambda step: losses[step])
    assert names == sorted({"last", "best", "step-4", "step-6", f"step-{best}"})
    assert (setting.folder / "checkpoints/last").resolve() == setting.checkpoint(6)
    assert (setting.folder / "checkpoints/best").resolve() == setting.checkpoint(best)
    again = lathe.load(setting.folder / "checkpoints/last").tensors()
    assert all(torch.equal(again[name], tensor) for name, tensor in setting.model.tensors().items())
    assert damage(setting.checkpoint(6)) is None


def test_resuming_cuts_the_metrics_back_and_a_finished_run_stays_as_it_is(setting: Setting, tmp_path: Path):
    setting.stop_after(5)
    assert len(metrics(setting.folder)) == 5
    assert setting() == [5, 6]
    assert setting() == []
    resumed, setting.folder = setting.folder, tmp_path / "whole"
    assert setting() == [1, 2, 3, 4, 5, 6]
    assert_same(resumed, setting.folder)


def test_adafactor_resumes_exactly(setting: Setting, tmp_path: Path):
    setting.settings = replace(setting.settings, optimizer=OptimizerSettings(kind="adafactor", lr=0.05))
    setting.stop_after(3)
    assert setting() == [3, 4, 5, 6]
    resumed, setting.folder = setting.folder, tmp_path / "whole"
    setting()
    assert_same(resumed, setting.folder)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.json", "optimizer/model.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    setting.stop_after(5)
    file = setting.checkpoint(4) / name
    file.write_bytes(file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING, logger="lathe"):
        assert setting() == [3, 4, 5, 6]
    assert str(file) in caplog.text
    resumed, setting.folder = setting.folder, tmp_path / "whole"
    setting()
    assert_same(resumed, setting.folder)


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(setting: Setting):
    setting.stop_after(5)
    for step in (2, 4):
        (setting.checkpoint(step) / "model.safetensors").unlink()
    with pytest.raises(LatheError, match=r"no checkpoint in .* is whole: .*step-2/model.safetensors is missing"):
        setting()
    assert len(metrics(setting.folder)) == 5


def test_a_run_is_not_overwritten_or_mixed_with_other_things(setting: Setting, tmp_path: Path):
    setting()
    with pytest.raises(RequestError, match="already holds a run: resume it, or"):
        setting(resume=False)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    setting.folder = tmp_path / "thesis"
    with pytest.raises(RequestError, match="holds something that is no run"):
        setting()


def change_architecture(setting: Setting) -> str:
    setting.architecture = setting.architecture.with_(d_ff=64)
    return r"was started with architecture\.decoder\.feed_forward\.d_ff=32 and this one says 64"


def change_rate(setting: Setting) -> str:
    setting.settings = replace(setting.settings, optimizer=OptimizerSettings(lr=1.0))
    return r"was started with optimizer\.lr=0\.005 and this one says 1\.0"


def change_data(setting: Setting) -> str:
    made = setting.data
    setting.data = lambda: Batches(made().corpus, made().objective, length=16, rows=4)
    return f"the run in {re.escape(str(setting.folder))}: the saved position is in other data: length was 32 and is 16"


def change_validation(setting: Setting) -> str:
    setting.validation_batches = 1
    return (
        r"was started with validation=2 batches, sha256 \w{16} and this one says 1 batches, sha256 \w{16}; resume with"
    )


@pytest.mark.parametrize("change", [change_architecture, change_rate, change_data, change_validation])
def test_resuming_another_run_is_one_line_and_loses_nothing(setting: Setting, change: Callable[[Setting], str]):
    setting.stop_after(5)
    before = {path: path.read_bytes() for path in setting.folder.rglob("*") if path.is_file()}
    line = change(setting)
    with pytest.raises(RequestError, match=line):
        setting()
    assert {path: path.read_bytes() for path in setting.folder.rglob("*") if path.is_file()} == before


def test_a_run_whose_record_is_older_than_a_question_goes_on(setting: Setting):
    setting.stop_after(3)
    record = setting.checkpoint(2) / "trainer.json"
    state = json.loads(record.read_text())
    del state["asked"]["validation"]
    record.write_text(json.dumps(state))
    manifest = record.with_name("manifest.json")
    sums = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sums, "trainer.json": digest_file(record)}))
    setting.validation_batches = 1
    assert setting(asked={"start_weights": "new"}) == [3, 4, 5, 6]


def test_a_finished_run_keeps_its_notes(setting: Setting):
    setting(notes={"run.json": "first"})
    assert setting(notes={"run.json": "second"}) == []
    assert (setting.folder / "run.json").read_text() == "first"


def test_what_computes_nothing_may_change_on_a_resume(setting: Setting):
    setting.stop_after(3)
    setting.settings = replace(setting.settings, spike=None, checkpointing=True)
    assert setting() == [3, 4, 5, 6]


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow past `limit` bytes, which looks to a program as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(setting: Setting):
    setting.stop_after(3)
    with small_files(4096), pytest.raises(LatheError, match=r"cannot write .*; the last good checkpoint is .*step-2"):
        setting()
    assert damage(setting.checkpoint(2)) is None
    assert setting() == [3, 4, 5, 6]


def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(setting: Setting):
    setting.stop_after(3)

    def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        found, n = objective_loss(model, batch)
        return found * math.nan, n

    with pytest.raises(LatheError, match=r"the loss is nan at step 3 .*; the last good checkpoint is .*step-2"):
        setting(loss_fn=loss)


def test_a_run_without_progress_stops_early_and_stays_stopped(setting: Setting):
    # At this rate the weights do not move, so no evaluation is better than the first.
    setting.settings = replace(setting.settings, steps=40, optimizer=OptimizerSettings(lr=1e-30, weight_decay=0.0))
    setting.save = SaveSettings(patience=3)
    assert setting()[-1] == 8
    assert setting() == []
    with pytest.raises(RequestError, match="patience counts evaluations"):
        fit(
            setting.model,
            setting.data(),
            setting.settings,
            setting.folder,
            write_model=setting.model.save,
            save=setting.save,
            resume=True,
        )


def test_one_process_trains_at_a_time(setting: Setting):
    with pytest.raises(RequestError, match="another process trains in"):
        setting(on_step=lambda report: setting())
