"""Hold the planner's memory against what PyTorch's allocator really gives out, and print the table.

    python -m benchmarks.plan_memory            print the table
    python -m benchmarks.plan_memory --write    and put it into docs/planning.md

Each row is one model in a process of its own: built with random weights, two training steps with AdamW as
`lathe.train` makes them (the second is measured, when the moments exist), the same with activation
checkpointing, and one pass over a prompt. The profiler reports every allocation and release of the CPU
allocator, so peaks are exact and hold the kernels' own workspace; the process's resident peak is printed
beside them and holds Python, the libraries and the allocator's waste as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "planning.md"
START, END = "<!-- plan_memory: start -->", "<!-- plan_memory: end -->"


@dataclass(frozen=True)
class Case:
    """One row: a preset, what is changed in it so that it trains here in seconds, and the batch."""

    name: str
    preset: str
    changes: dict[str, Any]
    batch: int
    length: int
    head: str | None = None


CASES = [
    Case("GPT-2, 4 layers", "gpt2", {"n_layers": 4, "vocab_size": 8000}, 4, 256),
    Case("GPT-2, 4 layers, no dropout", "gpt2", {"n_layers": 4, "vocab_size": 8000, "dropout": {}}, 4, 256),
    Case("GPT-2, small batch", "gpt2", {"n_layers": 4}, 1, 32),
    Case(
        "Llama, 4 layers, grouped heads",
        "llama-3.2-1b",
        {"d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_head": 64, "d_ff": 1536, "n_layers": 4, "vocab_size": 8000},
        4,
        256,
    ),
    Case("T5-small", "t5-small", {}, 4, 128),
    Case("T5-small, long rows", "t5-small", {"vocab_size": 8000}, 2, 512),
    Case("FLAN-T5-small shape", "flan-t5-small", {"vocab_size": 8000}, 4, 128),
    Case("BERT, 6 layers, masked", "bert-base-uncased", {"n_layers": 6, "vocab_size": 8000}, 4, 128, "masked"),
    Case("ALBERT-base, masked", "albert-base-v2", {"vocab_size": 8000}, 4, 128, "masked"),
    Case("BART, 3 + 3 layers", "bart-base", {"n_layers": 3, "vocab_size": 8000}, 4, 128),
]


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process; bytes, predicted and measured."""
    import torch

    from lathe.model.transformer import Transformer
    from lathe.planner.memory import inference_memory, training_memory
    from lathe.presets import preset

    torch.set_num_threads(1)
    architecture = preset(case.preset, case.head).with_(case.changes)
    training = training_memory(architecture, case.batch, case.length)
    inference = inference_memory(architecture, case.batch, case.length)
    model = Transformer(architecture, seed=0)
    static = training.weights + training.optimizer
    found = _train(model, case)
    model.set_checkpointing(True)
    checkpointed = _train(model, case)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "name": case.name,
        "batch": f"{case.batch} × {case.length}",
        "activations": (training.activations.total, found["kept"]),
        "training": (training.total, static + found["peak"]),
        "checkpointed": (training.total_checkpointed, static + checkpointed["peak"]),
        "inference": (inference.total, inference.weights + _read(model, case)),
        "resident": resident,
    }


def _train(model: Any, case: Case) -> dict[str, int]:
    import torch

    from lathe.data.batch import Batch
    from lathe.train.loss import objective_loss
    from lathe.train.optimiser import make_optimizer
    from lathe.train.settings import OptimizerSettings

    model.train()
    vocab = model.architecture.embedding.vocab_size
    ids, labels = (torch.randint(4, vocab, (case.batch, case.length)) for _ in range(2))
    inputs = {"input_ids": ids, "labels": labels}
    if model.encoder is not None and model.decoder is not None:
        inputs["decoder_input_ids"] = labels.clone()
    batch = Batch(inputs, tokens=ids.numel(), targets=labels.numel())
    optimizer = make_optimizer(model, OptimizerSettings())
    held: list[Any] = []

    def forward() -> None:
        held.append(objective_loss(model, batch)[0])

    def step() -> None:
        forward()
        held.pop().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    kept, _ = allocated(forward)
    held.clear()
    _, peak = allocated(step)
    return {"kept": kept, "peak": peak}


def _read(model: Any, case: Case) -> int:
    import torch

    from lathe.model.cache import Cache

    model.eval()
    architecture = model.architecture
    ids = torch.randint(4, architecture.embedding.vocab_size, (case.batch, case.length))
    inputs = {"input_ids": ids}
    if model.encoder is not None and model.decoder is not None:
        inputs["decoder_input_ids"] = ids

    def read() -> None:
        cache = None
        if model.decoder is not None:
            cache = Cache(architecture, case.batch, case.length)
        with torch.inference_mode():
            model(**inputs, past_key_values=cache)

    return allocated(read)[1]


def allocated(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes of the CPU allocator that `work` leaves allocated, and the most it had at once."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    current = peak = 0
    for _, change in events:
        current += change
        peak = max(peak, current)
    return current, peak


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: predicted MB, measured MB, and by how much the prediction is off."""
    columns = ("activations", "training", "checkpointed", "inference")
    lines = [
        "| model | batch × tokens | " + " | ".join(f"{c}: predicted / measured" for c in columns) + " | process |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for row in rows:
        cells = [f"{p / 1e6:,.0f} / {m / 1e6:,.0f} MB ({(p - m) / m:+.1%})" for p, m in (row[c] for c in columns)]
        lines.append(f"| {row['name']} | {row['batch']} | {' | '.join(cells)} | {row['resident'] / 1e6:,.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    """Measure every case, each in a fresh process, and print (or write) the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/planning.md")
    parser.add_argument("--case", type=int, help="measure this one in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(CASES[arguments.case])))
        return
    rows = []
    for index, case in enumerate(CASES):
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--case", str(index)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        rows.append(json.loads(done.stdout.decode().splitlines()[-1]))
        print(f"{case.name}: done", file=sys.stderr)
    text = table(rows)
    print(text)
    if arguments.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
