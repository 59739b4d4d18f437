"""Decode and encode with Lathe, `transformers`, CTranslate2, llama.cpp and OpenVINO in turns, and print one table.

    make bench-generate                                     everything; the better part of an hour on two cores
    make bench-generate ARGS="--quick --shapes llama"       whether it runs, in minutes
    python -m benchmarks.generate --shapes t5-small llama --rounds 5 --json generate.json --write

Everyone gets the same random weights (`benchmarks.generation.shapes`), the same prompts, as many threads and a
process of its own that is held still while another's turn is (`pool`). First the float32 greedy tokens of all are
compared and the errors of the narrower ones taken (`checks`); then they take turns for `--rounds` rounds
(`rounds`), and the medians count. Decoding one row reads each weight once a step, so the machine's read bandwidth is
the limit (`bandwidth`), and each row's share of it is printed; the keys and values of the text are not counted in.
At last each starts new processes, cold and warm (`startup`).

A contestant that is not installed has a row that says so. OpenVINO needs an older `transformers` than the others,
hence an environment of its own: `--openvino PYTHON` names its interpreter (docs/benchmarks.md has the commands).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.generation.bandwidth import Bandwidth, read_bandwidth
from benchmarks.generation.contest import Result, Setting, contest
from benchmarks.generation.rounds import Figures, Sizes
from benchmarks.generation.rows import chosen
from benchmarks.generation.shapes import SHAPES
from benchmarks.generation.table import machine, shape_table

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
START, END = "<!-- generate: start -->", "<!-- generate: end -->"
QUICK = {"rounds": 1, "batch": [1, 8], "new": 16, "prefill": 64}


def main() -> int:
    """Run everything; 1 where a contestant of Lathe's broke, or gave other tokens than the reference in float32."""
    given = _arguments()
    try:
        rows = chosen(given.contestants)
    except ValueError as reason:
        sys.stderr.write(f"bench-generate: {reason}\n")
        return 2
    sizes = Sizes(tuple(given.batch), new=given.new, prefill=given.prefill)
    setting = Setting(rows, sizes, given.rounds, given.threads, not given.no_startup, given.openvino, _say)
    with ExitStack() as stack:
        folder = given.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-generate-"))
        work = Path(folder).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bandwidth = read_bandwidth(given.threads, work)
        results = [contest(SHAPES[name].cut_to(given.layers), setting, work) for name in given.shapes]
        again = read_bandwidth(given.threads, work)  # beside other work the first may have been too slow
    bandwidth = max(bandwidth, again, key=lambda each: each.bytes_per_second)
    for result in results:
        _shares(result.found, bandwidth)
    tables = [shape_table(each.shape, each.found.values(), each.agreement, bandwidth) for each in results]
    text = "\n\n".join([machine(given.threads, bandwidth), *tables])
    print(text)
    if given.json:
        answer = json.dumps(_data(given, bandwidth, results), indent=2, default=str)
        given.json.write_text(answer + "\n", encoding="utf-8")
    if given.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
        DOCUMENT.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 1 if any(result.failed for result in results) else 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _arguments() -> argparse.Namespace:
    words = argparse.ArgumentParser(description="Tokens a second on a CPU, beside the peers.")
    words.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    words.add_argument("--contestants", nargs="+", help="as llamacpp-q8_0, or llamacpp for all of them; all: everyone")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--threads", type=int, default=os.cpu_count())
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--new", type=int, default=128, help="tokens that are decoded")
    words.add_argument("--prefill", type=int, default=256, help="tokens of the prompt that prefill reads")
    words.add_argument("--layers", type=int, help="so many layers only: a small model, to try the benchmark itself")
    words.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    words.add_argument("--no-startup", action="store_true", help="leave the new processes out")
    words.add_argument("--openvino", metavar="PYTHON", help="the interpreter of OpenVINO's environment")
    words.add_argument("--work", type=Path, help="keep models and conversions here, for another run")
    words.add_argument("--json", type=Path, help="a file for every figure of every round")
    words.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    given = words.parse_args()
    for name, small in QUICK.items():
        if given.quick and getattr(given, name) == words.get_default(name):
            setattr(given, name, small)
    return given


def _shares(found: dict[str, Figures], bandwidth: Bandwidth) -> None:
    """Each contestant's share of the bandwidth limit, decoding one row of tokens."""
    for each in found.values():
        rate = each.medians.get("decode-1")
        if rate is not None:
            each.share = rate * each.step_bytes / bandwidth.bytes_per_second


def _data(given: argparse.Namespace, bandwidth: Bandwidth, results: list[Result]) -> dict[str, Any]:
    return {
        "settings": {key: value for key, value in vars(given).items() if key not in ("json", "work", "openvino")},
        "machine": machine(given.threads, bandwidth),
        "bandwidth": asdict(bandwidth),
        "shapes": [
            {
                "name": each.shape.name,
                "parameters": each.shape.parameters(),
                "weights_read_a_step": each.shape.read_a_step(),
                "tokens": None if each.agreement is None else asdict(each.agreement),
                "contestants": [asdict(figures) for figures in each.found.values()],
            }
            for each in results
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
