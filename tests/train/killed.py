"""Run as a program: train in children that are killed at random instants, then let the run end.

    python killed.py FOLDER SEED KILLS STEPS [adapter]

torch is imported once, here; each child is forked from this process, trains in FOLDER/run, resuming what is
there, and dies by SIGKILL. Half of the kills come from outside, a random while after the run moved past a random
step; half strike inside a save, at one of its flushes to the disk. Prints a JSON list of how the children ended.
With `adapter`, a LoRA adapter is trained instead of the model.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lathe.adapt import LoraSettings, add_lora
from lathe.checkpoint.save import save_checkpoint
from lathe.data import Batches, Corpus
from lathe.model.transformer import Transformer
from lathe.objectives import Causal, SpecialTokens
from lathe.presets import preset
from lathe.train import OptimizerSettings, SaveSettings, ScheduleSettings, TrainSettings
from lathe.train.adapting import write_adapter
from lathe.train.run import fit

VOCAB = 64
TINY = preset("gpt2").with_(
    {"tokens.pad": 0, "tokens.eos": [1], "tokens.bos": None},
    d_model=16,
    n_layers=1,
    n_heads=2,
    d_head=8,
    d_ff=32,
    vocab_size=VOCAB,
    max_positions=32,
)


def train_in(folder: Path, steps: int, adapter: bool = False) -> None:
    """The run that is killed: dropout, a warm-up, accumulation and evaluations are all on."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    corpus = Corpus.of(VOCAB, text=[np.arange(7, 7 + size) for size in rng.integers(6, 20, size=60)])
    batches = Batches(corpus, Causal(special=SpecialTokens(vocab_size=VOCAB, pad=0, eos=1)), length=32, rows=2)
    model = Transformer(TINY, seed=0)
    if adapter:
        add_lora(model, LoraSettings(rank=2, dropout=0.1, targets="reader,writer"))
    settings = TrainSettings(
        steps=steps,
        accumulate=2,
        dropout=0.1,
        optimizer=OptimizerSettings(lr=5e-3),
        schedule=ScheduleSettings(warmup=5),
        evaluate_every=6,
    )
    fit(
        model,
        batches,
        settings,
        folder,
        write_model=lambda path: (
            write_adapter(model, path, "tiny", None) if adapter else save_checkpoint(path, TINY, model.state_dict())
        ),
        save=SaveSettings(every=4),
        evaluation=batches.one_pass(2),
        resume=True,
    )


def forked(work: Callable[[], None]) -> int:
    """Do `work` in a child; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # noqa: BLE001 - the child must not go on as the parent
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill_at_flush(number: int) -> None:
    """Die at the flush of that number."""
    flush, count = os.fsync, itertools.count(1)

    def dying(fd: Any) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(fd)

    os.fsync = dying


def lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_once(train: Callable[[], None], folder: Path, inside: bool, chance: random.Random) -> int:
    """How a child ended, as `waitpid` says."""
    if inside:
        number = chance.randint(1, 16)

        def work() -> None:
            kill_at_flush(number)
            train()

        return os.waitpid(forked(work), 0)[1]
    target, pause = lines(folder) + chance.randint(1, 6), chance.uniform(0, 0.02)
    child = forked(train)
    while lines(folder) < target and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.001)
        # What the checkpoint does not hold is cut off first: the target is then out of reach of this look.
        target = min(target, lines(folder) + 6)
    time.sleep(pause)
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return os.waitpid(child, 0)[1]


def main(folder: Path, seed: int, kills: int, steps: int, adapter: bool) -> None:
    chance = random.Random(seed)
    train_in(folder / "warm", 1, adapter)  # the first step imports the rest of torch, once for all children
    ends: list[int] = []
    run = folder / "run"
    for number in range(kills):
        ends.append(kill_once(lambda: train_in(run, steps, adapter), run, number % 2 == 1, chance))
    ends.append(os.waitpid(forked(lambda: train_in(run, steps, adapter)), 0)[1])
    ends.append(os.waitpid(forked(lambda: train_in(folder / "whole", steps, adapter)), 0)[1])
    print(json.dumps(ends))  # noqa: T201 - this is a program


if __name__ == "__main__":
    seed, kills, steps = (int(word) for word in sys.argv[2:5])
    main(Path(sys.argv[1]), seed, kills, steps, adapter=sys.argv[5:] == ["adapter"])
