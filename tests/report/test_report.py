"""`lathe report`: what runs wrote down becomes a page and a picture; torn, absent and damaged files are one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lathe.errors import RequestError
from lathe.report.history import read_run, smooth
from lathe.report.plots import Line, Panel, curves, panel, thinned

PNG = b"\x89PNG"


def make_run(folder: Path, n: int = 40, **settings: Any) -> Path:
    """A run of `n` steps of 100 tokens and half a second each, evaluated every ten, best at step 20."""
    folder.mkdir(parents=True)
    lines, times = [], []
    for step in range(1, n + 1):
        line: dict[str, Any] = {"step": step, "loss": 4 / step, "lr": 1e-3, "gradient_norm": 1.0, "tokens": 100 * step}
        if step % 10 == 0:
            line["evaluation"] = {"loss": 1 + abs(step - 20) / 10, "targets": 7}
        lines.append(json.dumps({**line, "batch": "epoch 0, row 0"}))
        times.append(json.dumps({"step": step, "seconds": step / 2}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "speed.jsonl").write_text("\n".join(times) + "\n")
    (folder / "run.json").write_text(json.dumps({"model": "<b>gpt2</b>", "steps": n, "optimizer": settings}))
    for name, step in (("best", 20), ("last", n)):
        (folder / f"checkpoints/step-{step}").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / name).symlink_to(f"step-{step}")
    return folder


def test_one_run_becomes_a_page_and_a_picture_in_its_directory(cli: Callable, tmp_path: Path):
    run = make_run(tmp_path / "run", lr=1e-3)
    ran = cli("report", str(run), "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert (run / "report.png").read_bytes().startswith(PNG)
    page = Path(answer["page"]).read_text(encoding="utf-8")
    assert page.count("<svg") == 4  # loss with validation, rate, gradient, speed
    assert "&lt;b&gt;gpt2" in page  # what a run was asked is text, not markup
    assert not re.findall(r"(?:src|href)=\"(?!#)", page.replace("xlink:href", "href"))  # nothing is fetched
    found = answer["runs"][0]
    assert found["best_evaluation"] == {"step": 20, "loss": 1.0}
    assert (found["best_checkpoint"], found["last_checkpoint"]) == (20, 40)
    assert (found["steps"], found["tokens"], found["loss"]) == (40, 4000, 0.1)
    assert found["tokens_per_second"] == pytest.approx(200)
    assert [each["step"] for each in found["evaluations"]] == [10, 20, 30, 40]
    before = page, (run / "report.png").read_bytes()
    assert cli("report", str(run)).code == 0  # an older report is replaced
    assert ((run / "report.html").read_text(encoding="utf-8"), (run / "report.png").read_bytes()) == before


def test_several_runs_are_laid_over_each_other_and_their_differences_listed(cli: Callable, tmp_path: Path):
    one = make_run(tmp_path / "a" / "run", lr=1e-3, clip=1.0)
    other = make_run(tmp_path / "b" / "run", 30, lr=3e-3, clip=1.0)
    for by in ("steps", "seconds"):
        ran = cli("report", str(one), str(other), "--out", str(tmp_path / f"{by}.html"), "--by", by)
        assert ran.code == 0, ran.err
        assert "a/run: step 40" in ran.out
        assert (tmp_path / f"{by}.png").read_bytes().startswith(PNG)
    page = (tmp_path / "steps.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    differing, same = page.split("In what the runs differ")[1].split("Settings that all have")
    assert "optimizer.lr" in differing
    assert "optimizer.clip" not in differing
    assert "optimizer.clip" in same
    assert not (one / "report.html").exists()


def test_a_torn_last_line_and_missing_files_are_left_out_with_a_note(cli: Callable, tmp_path: Path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (run / "speed.jsonl").unlink()
    (run / "run.json").unlink()
    (run / "checkpoints" / "best").unlink()
    ran = cli("report", str(run), "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["runs"][0]
    assert (found["steps"], found["seconds"], found["best_checkpoint"]) == (40, None, None)
    assert [note.rsplit("/", 1)[-1] for note in found["notes"]] == [
        "metrics.jsonl, line 41 ends early and is left out: the run was killed there, or is writing it",
        "speed.jsonl is missing: no times and no tokens a second",
        "run.json is missing: the settings are not known",
    ]
    assert (run / "report.html").read_text(encoding="utf-8").count("<svg") == 3
    assert "has no times" in cli("report", str(run), "--by", "seconds").err


def test_a_run_without_evaluations_or_of_one_step_is_drawn(cli: Callable, tmp_path: Path):
    run = make_run(tmp_path / "run", 1)
    assert cli("report", str(run), "--out", str(tmp_path / "new")).code == 0
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("spoil", "code", "line"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), 2, "holds no metrics.jsonl: expected a run's directory"),
        (lambda run: (run / "metrics.jsonl").write_text(""), 2, "holds no whole step yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1'), 2, "holds no whole step yet"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n{}\n"), 1, "metrics.jsonl, line 1 is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), 1, "metrics.jsonl, line 1 is damaged"),
        (lambda run: (run / "run.json").write_text("{"), 1, "run.json is not JSON"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(
    cli: Callable, tmp_path: Path, spoil: Callable[[Path], object], code: int, line: str
):
    run = make_run(tmp_path / "run")
    spoil(run)
    ran = cli("report", str(run))
    assert ran.code == code
    assert line in ran.err
    assert ran.err.count("\n") == 1
    assert not list(run.glob("report.*"))


def test_requests_that_cannot_be_are_refused(cli: Callable, tmp_path: Path):
    run = str(make_run(tmp_path / "run"))
    assert "is no directory" in cli("report", str(tmp_path / "nowhere")).err
    assert "is named twice" in cli("report", run, f"{run}/../run").err
    assert "expected one of steps, tokens, seconds" in cli("report", run, "--by", "time").err
    ran = cli("report", run, "--out", f"{run}/metrics.jsonl")
    assert "expected a file that ends in .html" in ran.err
    assert "loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_smoothing_is_a_mean_around_each_value():
    assert smooth([1, 2, 6, 3, 3], 1) == [1.5, 3, pytest.approx(11 / 3), 4, 3]
    assert smooth([5.0, 1.0], 0) == [5, 1]


def test_names_are_as_short_as_they_can_be(tmp_path: Path):
    with pytest.raises(RequestError, match="holds no"):
        read_run(tmp_path)
    assert read_run(make_run(tmp_path / "run")).name == "run"


def test_no_spike_of_a_long_curve_is_lost():
    ys = [math.sin(at / 50) for at in range(50_000)]
    ys[31_234], ys[7] = 100.0, -50.0
    xs, kept = thinned(range(50_000), ys)
    assert len(xs) < 1000
    assert (max(kept), min(kept)) == (100.0, -50.0)
    assert xs[0] == 0
    assert xs[-1] == 49_999
    assert xs == sorted(xs)


def test_every_line_is_drawn_and_none_looks_like_another():
    lines = [Line([0, 1], [n, n + 1], f"run {n}", n) for n in range(9)]
    for drawn in (
        panel(Panel("", "step", "loss", lines)),
        curves({line.label or "": (line.xs, line.ys) for line in lines}, x="step", y="loss"),
    ):
        looks = re.findall(r'clip-path="[^"]*" style="(fill: none; stroke[^"]*)"', drawn)
        # The grid is drawn in one look of its own.
        assert len(set(looks)) == 9 + 1
