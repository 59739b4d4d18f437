"""Train one architecture on the same reviews with `transformers.Trainer` and with Lathe, and print useful tokens/s.

    make bench-train DATA=FOLDER                          the folder that holds reviews-ko.train.tsv.gz
    python -m benchmarks.train --data FOLDER --rounds 3 --tokens 100000 --json bench-train.json

Everyone starts from the same weights (Lathe's, saved and opened by `transformers`), reads the same reviews with the
same tokenizer, masks 15 % of the tokens 80/10/10, drops out as much, and moves by AdamW at the same rates, with the
same number of useful tokens a step on average: 32 reviews, packed by Lathe into full rows. Useful tokens are those of
the text and its marks; padding is not counted. The loss is taken by one and the same code on the same held-out masks,
after the same number of useful tokens. Contestants take turns, each in a process of its own; the medians over the
rounds are printed. The share of the peak is that of the products that useful tokens need, over the speed of one large
product of matrices, measured in float32 in the same process before the training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REVIEWS, HELD_OUT, COLUMN = "reviews-ko.train.tsv.gz", "reviews-ko.valid.tsv.gz", "document"
ROWS = 32  # reviews a step
LENGTH = 128  # positions of a packed row; the longest review is cut to it
RATE, WARMUP_STEPS = 5e-4, 20
SIZES = {
    "bert": ("bert-base-uncased", {"d_model": 256, "n_layers": 4, "n_heads": 4, "d_head": 64, "d_ff": 1024}),
    "bert-base": ("bert-base-uncased", {}),
}


@dataclass(frozen=True)
class Contestant:
    """Who trains, in which precision; for Trainer, how it picks its batches."""

    name: str
    library: str
    precision: str = "fp32"
    sampling: str = "random"
    compile: bool = False


CONTESTANTS = [
    Contestant("Trainer", "trainer"),
    Contestant("Trainer, bf16", "trainer", "bf16"),
    Contestant("Trainer, grouped by length", "trainer", sampling="group_by_length"),
    Contestant("Trainer, bf16, grouped by length", "trainer", "bf16", "group_by_length"),
    Contestant("Lathe", "lathe"),
    Contestant("Lathe, bf16", "lathe", "bf16"),
]


@dataclass
class Found:
    """What one contestant did in one round."""

    name: str
    tokens_per_second: float  # useful ones
    share_of_peak: float
    peak_bytes: int  # of resident memory, or of the GPU's
    loss: float  # nats for each masked token of the held-out reviews
    tokens: int


def main() -> None:
    """Run everyone in turns, and print the table."""
    words = argparse.ArgumentParser(description="Useful tokens/s of training, beside transformers.Trainer.")
    words.add_argument("--data", default=os.environ.get("DATA"), help="the folder that holds the reviews; or DATA")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--tokens", type=int, default=100_000, help="useful tokens that each trains on, in each round")
    words.add_argument("--vocabulary", type=int, default=14_000)
    words.add_argument("--size", choices=SIZES, default="bert")
    words.add_argument("--threads", type=int, default=os.cpu_count())
    words.add_argument("--only", action="append", help="the name of a contestant; may be repeated")
    words.add_argument("--compile", action="store_true", help="torch.compile for everyone")
    words.add_argument("--json", type=Path, help="a file for every figure of every round")
    words.add_argument("--worker", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        print(json.dumps(asdict(_work(**json.loads(given.worker)))))
        return
    if given.data is None or not (Path(given.data) / REVIEWS).is_file():
        sys.exit(f"bench-train: there is no {REVIEWS} in {given.data or 'DATA'}; give its folder as --data or DATA")
    chosen = [each for each in CONTESTANTS if not given.only or each.name in given.only]
    with tempfile.TemporaryDirectory() as scratch:
        _prepare(Path(scratch), Path(given.data), given.vocabulary, given.size)
        rounds: list[Found] = []
        for number in range(given.rounds):
            for each in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
                task = {**asdict(each), "compile": given.compile}
                asked = {"contestant": task, "scratch": scratch, "data": given.data, "tokens": given.tokens}
                rounds.append(_in_a_process({**asked, "threads": given.threads}))
                last = rounds[-1]
                print(f"round {number + 1}: {last.name}: {last.tokens_per_second:,.0f} tokens/s", file=sys.stderr)
    medians = [_median(each.name, rounds) for each in chosen]
    print(_table(medians))
    if given.json:
        answer = {"settings": {k: v for k, v in vars(given).items() if k not in ("worker", "json")}}
        answer["medians"], answer["rounds"] = ([asdict(each) for each in some] for some in (medians, rounds))
        given.json.write_text(json.dumps(answer, indent=2, default=str) + "\n", encoding="utf-8")


def _prepare(scratch: Path, data: Path, vocabulary: int, size: str) -> None:
    """One tokenizer and one set of first weights for everyone."""
    import lathe
    from lathe.data import read
    from lathe.text.train import train_tokenizer

    texts = (record["text"] for record in read(data / REVIEWS, fields={"text": COLUMN}))
    tokenizer = train_tokenizer(list(islice(texts, 60_000)), vocabulary, convention="bert")
    name, changes = SIZES[size]
    shape = lathe.preset(name, "masked").with_({**changes, "vocab_size": tokenizer.vocab_size, "max_positions": LENGTH})
    lathe.Model(shape, seed=0, tokenizer=tokenizer).save(scratch / "first")


def _in_a_process(asked: dict[str, Any]) -> Found:
    command = [sys.executable, "-m", "benchmarks.train", "--worker", json.dumps(asked)]
    env = {**os.environ, "OMP_NUM_THREADS": str(asked["threads"]), "PYTHONPATH": str(ROOT / "src")}
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return Found(**json.loads(ran.stdout.splitlines()[-1]))


def _work(contestant: dict[str, Any], scratch: str, data: str, tokens: int, threads: int) -> Found:
    """Train as one contestant, then take the loss."""
    import torch

    from lathe.train.machine import matrix_peak, pick_device

    torch.set_num_threads(threads)
    who, first, device = Contestant(**contestant), Path(scratch) / "first", pick_device("auto")
    peak = matrix_peak(device, "fp32")
    run: Callable[..., tuple[float, Path]] = _trainer if who.library == "trainer" else _lathe
    seconds_a_token, trained = run(who, first, Path(data) / REVIEWS, tokens, Path(scratch) / "trained")
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss, flops_a_token = _judge(trained, Path(data) / HELD_OUT)
    return Found(who.name, 1 / seconds_a_token, flops_a_token / seconds_a_token / peak, peak_bytes, loss, tokens)


def _lathe(who: Contestant, first: Path, reviews: Path, tokens: int, out: Path) -> tuple[float, Path]:
    from lathe.train.job import open_job
    from lathe.train.request import read_request

    useful = sum(min(n, LENGTH) for n in islice(_lengths(first, reviews), 4000)) / 4000
    words = {
        "data": str(reviews),
        "data.fields.text": COLUMN,
        "objective": "masked",
        "data.length": LENGTH,
        "data.rows": max(round(ROWS * useful / LENGTH), 1),
        "data.cache": str(out.parent / "cache"),
        "tokens": tokens,
        "precision": who.precision,
        "compile": who.compile,
        "optimizer.lr": RATE,
        "optimizer.beta2": 0.999,
        "optimizer.weight_decay": 0.0,
        "schedule.kind": "constant",
        "schedule.warmup": WARMUP_STEPS,
        "out": str(out / f"lathe-{who.precision}-{time.time_ns()}"),
    }
    job = open_job(read_request({"model": str(first)}, words))
    clock = _Clock()
    job.run(on_step=lambda report: clock.tick(report.tokens))
    return clock.seconds_a_token, Path(words["out"]) / "checkpoints" / "last"


def _trainer(who: Contestant, first: Path, reviews: Path, tokens: int, out: Path) -> tuple[float, Path]:
    import torch
    import transformers
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    from lathe.data import read

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForMaskedLM.from_pretrained(first)
    tokenizer = transformers.AutoTokenizer.from_pretrained(first)
    texts = [record["text"] for record in read(reviews, fields={"text": COLUMN})]
    # More than one pass is never asked for here.
    rows = tokenizer(texts[: tokens // 5], truncation=True, max_length=LENGTH)["input_ids"]
    examples = [{"input_ids": row, "length": len(row)} for row in rows]
    masked, clock, seen = DataCollatorForLanguageModeling(tokenizer), _Clock(), [0]

    def collate(batch: list[dict[str, Any]]) -> Any:
        seen[0] += sum(each["length"] for each in batch)
        return masked([{"input_ids": each["input_ids"]} for each in batch])

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            clock.tick(seen[0])
            control.should_training_stop = seen[0] >= tokens
            return control

    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(out / f"trainer-{time.time_ns()}"),
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        num_train_epochs=1,
        bf16=who.precision == "bf16",
        torch_compile=who.compile,
        train_sampling_strategy=who.sampling,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[Stop()]).train()
    # A finished batch stands in `seen` one step early where the loader fetches ahead; the clock ends at what is done.
    trained = Path(arguments.output_dir) / "model"
    model.save_pretrained(trained)
    tokenizer.save_pretrained(trained)
    return clock.seconds_a_token, trained


class _Clock:
    """Seconds a useful token, from the end of the third step on: first steps allocate and compile."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, int]] = []

    def tick(self, tokens: int) -> None:
        """A step has ended; `tokens` useful tokens were trained on up to now."""
        self.ticks.append((time.perf_counter(), tokens))

    @property
    def seconds_a_token(self) -> float:
        """The mean of all steps but the first three."""
        (began, before), (ended, after) = self.ticks[2], self.ticks[-1]
        return (ended - began) / (after - before)


def _lengths(first: Path, reviews: Path) -> Iterator[int]:
    """How many tokens each review has, with its marks."""
    from lathe.data import read
    from lathe.text import Tokenizer

    tokenizer = Tokenizer.load(first)
    for record in read(reviews, fields={"text": COLUMN}):
        yield len(tokenizer.encode(record["text"]))


def _judge(trained: Path, held_out: Path) -> tuple[float, float]:
    """The loss on held-out reviews under fixed masks; the matrix operations of training, a useful token."""
    from lathe.api.loading import load
    from lathe.train.machine import flops_of_training
    from lathe.train.measure import measure
    from lathe.train.request import read_evaluation

    data = {"data": str(held_out), "data.fields.text": COLUMN, "data.length": LENGTH, "data.cache": "none"}
    found = measure(
        read_evaluation({"model": str(trained), "objective": "masked", "limit": 2000, **data, "data.cache": None})
    )
    shape = load(trained).architecture
    return found["loss"], flops_of_training(shape, LENGTH, 1000, 150, False) / 1000


def _median(name: str, rounds: list[Found]) -> Found:
    own = [each for each in rounds if each.name == name]
    fields = ("tokens_per_second", "share_of_peak", "peak_bytes", "loss", "tokens")
    return Found(name, **{field: statistics.median(getattr(each, field) for each in own) for field in fields})


def _table(medians: list[Found]) -> str:
    head = f"{'':34}{'tokens/s':>10}{'of peak':>9}{'memory':>11}{'loss':>8}"
    lines = [
        f"{each.name:34}{each.tokens_per_second:10,.0f}{each.share_of_peak:9.1%}"
        f"{each.peak_bytes / 2**20:7,.0f} MiB{each.loss:8.3f}"
        for each in medians
    ]
    plain = next((each for each in medians if each.name == "Trainer"), None)
    peers = [each for each in medians if each.name.startswith("Trainer")]
    own = [each for each in medians if each.name.startswith("Lathe")]
    if own and peers and plain:
        ours, best = (max(some, key=lambda each: each.tokens_per_second) for some in (own, peers))
        lines += [
            "",
            f"{ours.name} beside Trainer as it comes: {ours.tokens_per_second / plain.tokens_per_second:.2f}x",
            f"{ours.name} beside Trainer's best ({best.name}): {ours.tokens_per_second / best.tokens_per_second:.2f}x",
        ]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    main()
