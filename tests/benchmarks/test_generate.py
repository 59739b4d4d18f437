"""The harness of `benchmarks.generate`: that it compares alike with alike and says so, on models of some thousand
weights. Nothing here looks at a speed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lathe
from benchmarks.generation.aims import aims
from benchmarks.generation.bandwidth import by_torch, read_bandwidth
from benchmarks.generation.base import Unfit, log_probs, versions
from benchmarks.generation.checks import Agreement, errors, first_difference, relative_error, same_tokens
from benchmarks.generation.contest import Setting, contest
from benchmarks.generation.pool import Worker
from benchmarks.generation.rounds import Figures, Sizes, measure
from benchmarks.generation.rows import ROWS, Row, chosen
from benchmarks.generation.shapes import SHAPES, Shape
from benchmarks.generation.table import machine, shape_table

SIZES = Sizes(batches=(1, 2), prompt=4, new=3, prefill=6, encode=5)
SMALL = {"d_model": 16, "d_ff": 32, "n_layers": 1, "n_heads": 2, "d_head": 8, "vocab_size": 64}
TINY = Shape("tiny", "t5-small", "seq2seq", SMALL)
# Lathe stands in for the reference: what is looked at is the harness, and transformers takes long to import.
STAND_IN = Row("transformers", "lathe", 32, 4)
OURS = Row("Lathe", "lathe", 32, 4)
ABSENT = Row("Absent", "openvino", 8, 1, options={"precision": "int8"})


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("worker")
    with Worker(OURS, TINY.kind, TINY.build(folder / "model"), folder / "lathe", 1, sys.executable) as started:
        started.ask("prepare")
        yield started


def test_a_step_reads_each_matrix_of_the_decoder_and_the_head_once():
    assert SHAPES["t5-small"].read_a_step() == (6 * (6 * 512 * 512 + 2 * 512 * 2048), 32128 * 512)
    assert SHAPES["llama"].read_a_step() == (12 * (4 * 768 * 768 + 3 * 768 * 2048), 32000 * 768)
    assert SHAPES["gpt2"].read_a_step() == (12 * (4 * 768 * 768 + 2 * 768 * 3072), 50257 * 768)
    assert SHAPES["t5-small"].parameters() == 60_506_624


def test_fewer_layers_are_another_shape():
    cut = SHAPES["gpt2"].cut_to(2)
    assert (cut.name, [stack.n_layers for _, stack in cut.architecture().stacks]) == ("gpt2-2", [2])
    assert SHAPES["gpt2"].cut_to(None) is SHAPES["gpt2"]


def test_prompts_are_the_same_each_time_and_inside_the_vocabulary():
    rows = np.array(TINY.prompts(3, 50, seed=1))
    assert rows.shape == (3, 50)
    assert rows.min() >= 32
    assert rows.max() < 64
    assert rows.tolist() == TINY.prompts(3, 50, seed=1)


def test_rows_are_named_by_the_beginnings_of_their_keys():
    assert [row.name for row in chosen(["llamacpp-q"])] == ["llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert [row.name for row in chosen(["transformers", "Lathe-int8"])] == ["transformers", "Lathe int8"]
    assert len(chosen(["lathe"])) == 4
    assert chosen(["all"]) == list(ROWS)
    assert "transformers, compiled" not in [row.name for row in chosen(None)]
    with pytest.raises(ValueError, match="--contestants vllm: expected all, or one of transformers, "):
        chosen(["vllm"])


def test_everyone_is_checked_measured_and_started_anew(tmp_path: Path):
    said: list[str] = []
    setting = Setting([STAND_IN, OURS, ABSENT], SIZES, 2, 1, False, None, said.append)
    result = contest(TINY, setting, tmp_path)
    ours = result.found["Lathe"]
    assert not result.failed
    assert result.agreement is not None
    assert result.agreement.equal == ("transformers", "Lathe")
    assert ours.errors == {"logits": 0.0, "log_probs": 0.0}
    assert {task: len(rates) for task, rates in ours.rounds.items()} == {"decode-1": 2, "decode-2": 2, "prefill-1": 2}
    assert ours.step_bytes == 4 * sum(TINY.read_a_step())
    assert ours.peak_bytes["whole run"] > 0
    assert "--openvino" in result.found["Absent"].reason
    turns = [line.split(": ")[3] for line in said if ": decode-1: " in line]
    assert turns == ["transformers", "Lathe", "Lathe", "transformers"]  # another begins each round


def test_a_worker_waits_without_running(worker: Worker):
    worker.ask("memory")
    if sys.platform == "linux":
        state = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        assert state == "T"  # stopped


def test_a_worker_decodes_what_the_model_does(worker: Worker, tmp_path: Path):
    model = lathe.load(TINY.build(tmp_path / "model"))
    prompts = TINY.prompts(2, 4, seed=3)
    ids = model.generate(model.embedding.tokens.weight.new_tensor(prompts).long(), max_new_tokens=5, eos_token_id=None)
    assert worker.ask("generate", prompts=prompts, new=5)["tokens"] == ids[:, 1:].tolist()


def test_a_contestant_that_computes_something_else_is_found(worker: Worker, tmp_path: Path):
    other = Shape("other", TINY.preset, TINY.kind, {**SMALL, "n_layers": 2})
    with Worker(OURS, other.kind, other.build(tmp_path / "model"), tmp_path / "w", 1, sys.executable) as second:
        second.ask("prepare")
        workers = {"transformers": worker, "Lathe": second}
        found = {name: Figures(name, 32, name == "Lathe") for name in workers}
        agreement = same_tokens(TINY, workers, found, SIZES)
        errors(TINY, workers, found, SIZES, tmp_path)
    assert agreement is not None
    assert "leaves it in row 1 at token" in agreement.different["Lathe"]
    assert found["Lathe"].errors["logits"] > 0.1


def test_a_worker_that_breaks_says_why_in_its_last_line(tmp_path: Path):
    with Worker(Row("Lathe", "nobody", 32, 4), "causal", tmp_path, tmp_path, 1, sys.executable) as broken:
        found = {"Lathe": Figures("Lathe", 32, True)}
        measure(TINY, {"Lathe": broken}, found, SIZES, 1, lambda line: None)
    assert found["Lathe"].broken
    assert "by_nobody" in found["Lathe"].reason
    assert found["Lathe"].medians == {}


def test_where_tokens_part():
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == "leaves it in row 2 at token 2 (5, not 4)"
    assert first_difference([[1, 2]], [[1]]) == "gave 1 tokens in row 1, not 2"


def test_an_error_is_a_share_of_the_spread():
    exact = np.array([1.0, 3.0, 5.0])
    assert relative_error(exact, exact) == 0
    assert relative_error(exact + exact.std(), exact) == pytest.approx(1)


def test_log_probs_of_tokens():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], dtype=np.float32)) + 100
    assert log_probs(logits, [1, 2]) == pytest.approx(np.log([0.25, 0.7]), abs=1e-5)


def test_the_table_holds_ratios_to_the_best_of_the_width_and_of_all():
    rows = [
        Figures("transformers", 32, False, medians={"decode-1": 10.0}),
        Figures("Wide", 32, False, medians={"decode-1": 20.0}),
        Figures("Narrow", 8, False, medians={"decode-1": 40.0}, share=0.5, errors={"logits": 0.01}),
        Figures("Lathe int8", 8, True, medians={"decode-1": 60.0}, first_token={"cold": 2.0, "warm": 1.0}),
        Figures("Gone", 8, False, reason="not installed: pip install gone"),
    ]
    bandwidth = by_torch(1, 1, 1)
    said = shape_table(TINY, rows, Agreement(6, ("transformers",), {"Wide": "leaves it"}), bandwidth)
    assert "| Lathe int8 | 1.50× / 1.50× / 6.00× |" in said
    assert "| best peer of any width | Narrow |" in said
    assert "| Gone | not installed: pip install gone |" in said
    assert "| Narrow | 40 | 50% | – | – | 1.0e-02 logits |" in said
    assert "2.00 / 1.00 s" in said
    assert "equal in transformers; Wide leaves it." in said
    assert f"{bandwidth.bytes_per_second / 1e9:.1f} GB/s" in machine(1, bandwidth)


def test_bandwidth_is_measured_with_a_compiler_and_without(tmp_path: Path):
    assert read_bandwidth(1, tmp_path, passes=1, mib=1).bytes_per_second > 0
    assert "no C compiler" in by_torch(1, passes=1, mib=1).how


def test_a_package_that_is_not_there_is_named():
    assert versions("lathe", missing="pip install lathe").startswith("lathe ")
    with pytest.raises(Unfit, match="not installed: pip install it"):
        versions("lathe", "no-such-package-of-anyone", missing="pip install it")


def test_aims_are_reached_missed_or_not_measured():
    rows = [
        Figures("transformers", 32, False, medians={"decode-1": 10.0, "decode-8": 90.0}),
        Figures("CTranslate2 int8", 8, False, medians={"decode-1": 20.0, "decode-8": 120.0}),
        Figures("Lathe int8", 8, True, medians={"decode-1": 60.0, "decode-8": 100.0}, share=0.5),
    ]
    assert {aim.name: (aim.found, aim.word) for aim in aims(rows) if aim.found is not None} == {
        "batch 1 / CTranslate2's best": (3.0, "reached"),
        "batch 1 / transformers": (6.0, "missed"),
        "batch 1, int8, share of the bandwidth limit": (0.5, "missed"),
        "decode-8 / the best peer of any width": (100 / 120, "missed"),
    }
    assert [aim.line for aim in aims(rows) if aim.found is None] == [
        "| batch 1, int8 / llama.cpp Q8_0 | 1.5 | not measured | |",
        "| batch 1, int4 / llama.cpp Q4_0 | 1.5 | not measured | |",
    ]
