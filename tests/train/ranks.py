"""Run as a program: the same tiny runs on one rank and on two, in processes that are forked from this one.

    python ranks.py FOLDER

torch is imported once, here. A world of ranks is a set of children with `torchrun`'s environment, which join over
gloo on a free port. What they find is left in FOLDER: a run's directory for each case, and beside it what each rank
saw, as `NAME.RANK.json`. Prints how every rank of every world ended, and what it said.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lathe.adapt import LoraSettings, add_lora, folded_tensors
from lathe.architecture import Architecture
from lathe.checkpoint.save import save_checkpoint
from lathe.cli import main as command_line
from lathe.data import Batch, Batches, Corpus
from lathe.errors import LatheError
from lathe.model.transformer import Transformer
from lathe.objectives import Causal, Objective, SentenceOrder, SpanCorruption, SpecialTokens
from lathe.presets import preset
from lathe.text.train import train_tokenizer
from lathe.train import OptimizerSettings, SaveSettings, StepReport, TrainSettings, objective_loss
from lathe.train.ranks import Ranks, joined
from lathe.train.run import fit

VOCAB = 64
SPECIAL = SpecialTokens(
    vocab_size=VOCAB, pad=0, eos=1, cls=2, sep=3, mask=4, sentinels=tuple(range(63, 53, -1)), decoder_start=0
)
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 32, "vocab_size": VOCAB}
TOKENS = {"tokens.pad": 0, "tokens.eos": [1], "tokens.bos": None}
# A decoder, an encoder-decoder, and an encoder whose layers share their weights, with a sentence's label besides.
SHAPES: dict[str, tuple[Architecture, Objective]] = {
    "gpt2": (preset("gpt2").with_(TOKENS, **SMALL, max_positions=32), Causal(special=SPECIAL)),
    "t5": (preset("t5-small").with_(**SMALL), SpanCorruption(special=SPECIAL)),
    "albert": (
        preset("albert-base-v1", head="pretraining").with_(**SMALL, d_embed=8, max_positions=32),
        SentenceOrder(special=SPECIAL),
    ),
}
# An odd number of rows, so that ranks have different numbers of rows and of targets.
ROWS = 5
PLAIN = TrainSettings(
    steps=4, accumulate=2, dropout=0.0, optimizer=OptimizerSettings(lr=5e-3, clip=0.5), evaluate_every=2
)
# A layer with a low-rank update in most places, and one that is trained whole.
QUICK = replace(PLAIN, optimizer=replace(PLAIN.optimizer, lr=5e-2))
LORA = LoraSettings(rank=2, targets="heads,reader:ffn", whole="writer:ffn")


def batches(shape: str, ranks: Ranks | None = None, rows: int = ROWS) -> Batches:
    ranks = ranks or Ranks()
    rng = np.random.default_rng(0)
    starts, sizes = rng.integers(7, 30, size=60), rng.integers(6, 20, size=60)
    text = [np.arange(start, start + size) for start, size in zip(starts, sizes)]
    corpus = Corpus.of(VOCAB, text=text, breaks=[[3, 5] for _ in text])
    return Batches(corpus, SHAPES[shape][1], length=32, rows=rows, rank=ranks.rank, n_ranks=ranks.size)


@dataclass
class Case:
    """One run, and what its loss function saw on this rank.

    Args:
        adapter: what is trained in place of the model.
        trouble: what goes wrong in the third step.
    """

    shape: str
    folder: Path
    ranks: Ranks
    settings: TrainSettings = PLAIN
    save: SaveSettings = field(default_factory=lambda: SaveSettings(every=2))
    adapter: LoraSettings | None = None
    trouble: str = ""
    losses: list[float] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    def loss(self, model: Transformer, batch: Batch) -> tuple[torch.Tensor, int]:
        self.draws.append(torch.rand(1).item())
        self.rows += batch.inputs["input_ids"].tolist()
        loss, n = objective_loss(model, batch)
        if len(self.draws) > 2 * PLAIN.accumulate:
            if self.trouble == "disk" and self.ranks.main:
                # No file may grow past this, which looks to a program as a full disk does.
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            if self.trouble == "error" and not self.ranks.main:
                raise LatheError("this rank met something")
            if self.trouble == "nan" and not self.ranks.main:
                loss = loss * math.nan
        return loss, n

    def run(self, until: int | None = None) -> Case:
        """Train, to the end or until all ranks are interrupted after a step."""
        model, data = Transformer(SHAPES[self.shape][0], seed=0), batches(self.shape, self.ranks)
        if self.adapter is not None:
            add_lora(model, self.adapter)

        def on_step(report: StepReport) -> None:
            self.losses.append(report.loss)
            if report.step == until:
                raise KeyboardInterrupt

        try:
            fit(
                model,
                data,
                self.settings,
                self.folder,
                write_model=lambda path: save_checkpoint(path, model.architecture, folded_tensors(model)),
                save=self.save,
                evaluation=data.one_pass(3),
                loss_fn=self.loss,
                resume=True,
                on_step=on_step,
                ranks=self.ranks,
            )
        except KeyboardInterrupt:
            if until is None:
                raise
        seen = {"losses": self.losses, "draws": self.draws, "rows": self.rows}
        self.folder.with_name(f"{self.folder.name}.{self.ranks.rank}.json").write_text(json.dumps(seen))
        return self


def one_rank(folder: Path, ranks: Ranks) -> None:
    for shape in SHAPES:
        Case(shape, folder / f"one-{shape}", ranks).run()
    Case("gpt2", folder / "one-lora", ranks, QUICK, adapter=LORA).run()


def two_ranks(folder: Path, ranks: Ranks) -> None:
    for parallel in ("ddp", "fsdp"):
        for shape in SHAPES:
            # Where layers are computed again, they are gathered again.
            settings = replace(PLAIN, parallel=parallel, checkpointing=shape == "t5")
            Case(shape, folder / f"{parallel}-{shape}", ranks, settings).run()
        Case("gpt2", folder / f"{parallel}-lora", ranks, replace(QUICK, parallel=parallel), adapter=LORA).run()
        dropping = replace(PLAIN, parallel=parallel, dropout=0.3)
        Case("gpt2", folder / f"whole-{parallel}", ranks, dropping).run()
        Case("gpt2", folder / f"resumed-{parallel}", ranks, dropping).run(until=3)
        Case("gpt2", folder / f"resumed-{parallel}", ranks, dropping).run()
    # At this rate the weights do not move, so no evaluation is better than the first.
    idle = replace(PLAIN, steps=9, evaluate_every=1, optimizer=OptimizerSettings(lr=1e-30, weight_decay=0.0))
    Case("gpt2", folder / "patient", ranks, idle, SaveSettings(patience=2)).run()


def chain(folder: Path, ranks: Ranks, parallel: str, until: int | None) -> None:
    """A part of a run that every part makes on other ranks."""
    Case("gpt2", folder / "chain", ranks, replace(PLAIN, parallel=parallel), SaveSettings(every=1)).run(until)


def trouble(folder: Path, ranks: Ranks, what: str) -> None:
    Case("gpt2", folder / what, ranks, trouble=what).run()


def typed(*words: str) -> int:
    """What a person types; each rank is the whole program."""
    sizes = ["d_model=16", "n_layers=1", "n_heads=2", "d_head=8", "d_ff=32", "max_positions=32"]
    given = ["objective=causal", "tokenizer=tok", "data.length=32", "data.cache=none", "device=cpu"]
    return command_line.main(["train", "gpt2", "--data", "corpus.txt", *given, *sizes, *words])


def world(size: int, work: Callable[[], int]) -> list[tuple[int, str]]:
    """Do `work` in so many processes; the code with which each ended, and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[tuple[int, int]] = []
    for rank in range(size):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            os.dup2(tell, 1)
            os.dup2(tell, 2)
            code = ended(work)
            sys.stdout.flush()
            os._exit(code)
        os.close(tell)
        children.append((child, told))
    # As `torchrun` does: the store is in a process that outlives the ranks. They try until it is there.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ends: list[tuple[int, str]] = []
    for child, told in children:
        with os.fdopen(told) as pipe:
            said = pipe.read()
        ends.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said))
    del store
    return ends


def ended(work: Callable[[], int]) -> int:
    """Do the work; an exit code. What goes wrong is a line, as on the command line."""
    try:
        return work()
    except LatheError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except SystemExit as end:
        return int(str(end.code))
    except BaseException:  # noqa: BLE001 - the child must not go on as the parent
        traceback.print_exc()
        return 99


def together(work: Callable[[Ranks], None]) -> list[tuple[int, str]]:
    """Do `work` on two ranks."""

    def join() -> int:
        with joined() as ranks:
            work(ranks)
        return 0

    return world(2, join)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    one_rank(folder, Ranks())  # here, not in a child: the first step imports the rest of torch, once for all
    importlib.import_module("lathe.train.parallel_shards")
    os.chdir(folder)
    Path("corpus.txt").write_text("".join(f"line {n} of a text that goes on for a while\n" for n in range(40)))
    train_tokenizer([Path("corpus.txt").read_text()], 300, convention="gpt2").save(Path("tok"))
    ends = {"runs": together(lambda ranks: two_ranks(folder, ranks))}
    chain(folder, Ranks(), "auto", 1)
    ends["chain"] = together(lambda ranks: chain(folder, ranks, "fsdp", 2))
    chain(folder, Ranks(), "none", 3)
    ends["chain's end"] = together(lambda ranks: chain(folder, ranks, "ddp", None))
    for what in ("error", "nan", "disk"):
        ends[what] = together(lambda ranks, what=what: trouble(folder, ranks, what))  # type: ignore[misc]
    ends["typed"] = world(2, lambda: typed("steps=2", "parallel=fsdp", "--out", "typed"))
    ends["mistyped"] = world(2, lambda: typed("stepz=2", "--out", "mistyped"))
    ends["too few rows"] = world(2, lambda: typed("steps=2", "data.rows=1", "--out", "mistyped"))
    print(json.dumps(ends))  # noqa: T201 - this is a program


if __name__ == "__main__":
    main(Path(sys.argv[1]))
