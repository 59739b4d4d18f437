"""Two ranks take the steps that one takes, leave the files that one leaves, and end together; see `ranks.py`.

Everything here reads what one run of that program left: processes are dear, and it makes each world of them once.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.checkpoint.tensors import open_tensors
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train import OptimizerSettings, TrainSettings, train
from lathe.train.checkpointing import damage
from lathe.train.machine import pick_device
from lathe.train.parallel import choose
from lathe.train.ranks import ALONE, Ranks
from tests.train.ranks import PLAIN, SHAPES, batches

PARALLEL = ("ddp", "fsdp")
# Sums in another order, and no more: the largest difference seen is 2e-7 in a loss and 2e-6 in a weight.
CLOSE = 1e-6


@dataclass(frozen=True)
class Found:
    """What the program left and printed."""

    folder: Path
    ends: dict[str, list[tuple[int, str]]]

    def metrics(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def seen(self, run: str, ranks: int = 2) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{run}.{rank}.json").read_text()) for rank in range(ranks)]

    def tensors(self, run: str) -> dict[str, torch.Tensor]:
        """The weights and moments of the last checkpoint."""
        found: dict[str, torch.Tensor] = {}
        for part in ("last", "last/optimizer"):
            with open_tensors(self.folder / run / "checkpoints" / part) as source:
                found |= dict(source.items())
        return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("ranks.py")
    done = subprocess.run([sys.executable, str(program), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed: dict[str, list[list[Any]]] = json.loads(done.stdout)
    return Found(folder, {world: [(code, said) for code, said in ends] for world, ends in printed.items()})


def assert_near(found: Found, run: str, other: str) -> None:
    """The same steps: losses, gradients, counts and evaluations, weights and moments."""
    lines, wanted = found.metrics(run), found.metrics(other)
    assert len(lines) == len(wanted) == PLAIN.steps
    for line, right in zip(lines, wanted):
        assert line.keys() == right.keys()
        for key in ("loss", "gradient_norm"):
            assert line.pop(key) == pytest.approx(right.pop(key), rel=CLOSE)
        if "evaluation" in right:
            assert line.pop("evaluation") == pytest.approx(right.pop("evaluation"), rel=CLOSE)
        assert line == right  # the rate, the tokens and the batch are the same
    tensors, right_tensors = found.tensors(run), found.tensors(other)
    assert tensors.keys() == right_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, right_tensors[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("shape", [*SHAPES, "lora"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks_take_the_steps_of_one(found: Found, parallel: str, shape: str):
    assert found.ends["runs"] == [(0, ""), (0, "")]
    assert_near(found, f"{parallel}-{shape}", f"one-{shape}")


def test_a_run_goes_on_on_other_ranks_from_one_to_sharded_to_one_to_replicated(found: Found):
    assert found.ends["chain"] == found.ends["chain's end"] == [(0, ""), (0, "")]
    assert_near(found, "chain", "one-gpt2")


@pytest.mark.parametrize("parallel", PARALLEL)
def test_as_many_ranks_repeat_a_run_bit_for_bit_and_each_drops_its_own(found: Found, parallel: str):
    whole, resumed = found.folder / f"whole-{parallel}", found.folder / f"resumed-{parallel}"
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    wanted, again = found.tensors(whole.name), found.tensors(resumed.name)
    assert wanted.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    first, second = (seen["draws"] for seen in found.seen(whole.name))
    assert not set(first) & set(second)
    assert first == found.seen(whole.name.replace(parallel, PARALLEL[parallel == "ddp"]))[0]["draws"]


def test_ranks_read_the_rows_of_one_and_share_none(found: Found):
    unpadded = [[[token for token in row if token] for row in seen["rows"]] for seen in found.seen("ddp-gpt2")]
    whole = [[token for token in row if token] for row in found.seen("one-gpt2", ranks=1)[0]["rows"]]
    assert [len(rows) for rows in unpadded] == [2 * 8, 3 * 8]  # of 5 rows, in 4 steps of 2 batches
    assert sorted(unpadded[0] + unpadded[1]) == sorted(whole)
    assert len({tuple(row) for row in whole}) > 20, "rows repeat: a shared one would not be seen"


@pytest.mark.parametrize("run", ["fsdp-gpt2", "ddp-t5"])
def test_a_checkpoint_of_several_ranks_is_a_model_as_any_other(found: Found, run: str):
    checkpoint = found.folder / run / "checkpoints" / "step-4"
    assert damage(checkpoint) is None
    weights = lathe.load(checkpoint).tensors()
    shapes = {name: tensor.shape for name, tensor in Transformer(SHAPES[run.partition("-")[2]][0]).state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes
    names = {entry.name for entry in checkpoint.parent.iterdir()}
    assert names == {"last", "best", "step-2", "step-4"}


def test_ranks_stop_early_together(found: Found):
    assert [line["step"] for line in found.metrics("patient")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("error", "this rank met something"),
        ("nan", "the loss is nan at step 3 (epoch 0, row 20)"),
        ("disk", "cannot write"),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_line_and_no_half_checkpoint(found: Found, what: str, line: str):
    ends = found.ends[what]
    assert [code for code, _ in ends] == [1, 1]
    said = [text for _, text in ends if text]
    assert len(said) == 1
    assert said[0].startswith(line)
    assert said[0].endswith("step-2\n")
    assert said[0].count("\n") == 1
    checkpoints = found.folder / what / "checkpoints"
    assert {entry.name for entry in checkpoints.iterdir()} == {"last", "best", "step-2"}
    assert damage(checkpoints / "step-2") is None


def test_the_command_line_speaks_with_one_voice(found: Found):
    (code, said), other = found.ends["typed"]
    assert code == 0
    assert other == (0, "")
    assert said.count("reading corpus.txt") == said.count("step 2: loss") == 1
    assert "on cpu, 2 processes" in said
    assert (found.folder / "typed" / "run.json").is_file()


@pytest.mark.parametrize(
    ("what", "line"),
    [("mistyped", "lathe: unknown key 'stepz'"), ("too few rows", "lathe: rows=1 in a batch for 2 ranks")],
)
def test_a_request_that_cannot_be_is_one_line_for_all(found: Found, what: str, line: str):
    ends = found.ends[what]
    assert [code for code, _ in ends] == [2, 2]
    said = "".join(text for _, text in ends).splitlines()
    (spoken,) = (each for each in said if each.startswith("lathe: "))
    assert spoken.startswith(line)
    assert not (found.folder / "mistyped").exists()


def test_what_cannot_be_spread_is_refused(monkeypatch: pytest.MonkeyPatch):
    group = Ranks(rank=0, size=2, local=0, grouped=True)
    assert choose(TrainSettings(steps=1), ALONE) == "none"
    assert choose(TrainSettings(steps=1), group) == "ddp"
    with pytest.raises(RequestError, match="parallel=fsdp: this is one process; start several with torchrun"):
        choose(TrainSettings(steps=1, parallel="fsdp"), ALONE)
    with pytest.raises(RequestError, match="parallel=none: torchrun started 2 processes"):
        choose(TrainSettings(steps=1, parallel="none"), group)
    adafactor = OptimizerSettings(kind="adafactor")
    with pytest.raises(RequestError, match="parallel=fsdp: adafactor takes means over the rows"):
        choose(TrainSettings(steps=1, parallel="fsdp", optimizer=adafactor), group)
    with pytest.raises(RequestError, match=r"device=cuda:1 under torchrun: expected cuda \(each process takes its own"):
        pick_device("cuda:1", group)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RequestError, match="device=cuda: process 2 of this machine has no GPU, for there are 1"):
        pick_device("cuda", Ranks(rank=1, size=2, local=1, grouped=True))


def test_a_sentence_label_counts_by_rows_however_the_batch_is_cut():
    def losses(parts: int) -> list[float]:
        each = [batches("albert", Ranks(rank, parts), rows=8) for rank in range(parts)]
        cut = (next(part) for part in itertools.cycle(each))
        settings = replace(PLAIN, steps=3, accumulate=parts)
        return train(Transformer(SHAPES["albert"][0], seed=0), cut, settings).losses

    assert losses(8) == pytest.approx(losses(1), rel=CLOSE)
