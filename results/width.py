"""What each way to cut the width costs, without healing: perplexity over the parent's, on text that fitted nothing.

    python results/width.py bert --out width-bert

Cuts the model that a run left to 87.5, 75, 62.5, 50 and 37.5% (rounded to what the heads can fill) with truncate,
select and rotate, each with and without the least-squares refit; fitted on the run's training text, measured on what
it validates on. The table goes to stdout and to OUT.md, the numbers to OUT.json after every cut, so that an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from parent import Ledger, Parent, open_parent, width

import lathe
from lathe.data.batch import Batch
from lathe.reshape.measure import parameters_of

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375)
WAYS = [(method, refit) for method in ("truncate", "select", "rotate") for refit in (False, True)]


def main() -> None:
    """Cut, measure, and print the table."""
    given = _words()
    parent = open_parent(given.run, given.held_tokens)
    ledger = Ledger(given.out.with_suffix(".json"))
    fitted = parent.sample(given.tokens)
    whole = ledger.once("parent", parent.perplexity)
    counts = [sum(batch.tokens for batch in batches) for batches in (fitted, parent.held)]
    lines = [
        f"{parent}, perplexity {whole:.3f}; fitted on {counts[0]:,} tokens, measured on {counts[1]:,}.",
        "",
        "| width | " + " | ".join(_name(*way) for way in WAYS) + " |",
        "|---|" + "---:|" * len(WAYS),
    ]
    for share in given.shares:
        size = width(parent.model, share)
        found = [ledger.once(f"{size} {_name(*way)}", _cut, parent, size, way, fitted) for way in WAYS]
        cells = " | ".join(f"{each['perplexity'] / whole:.3f}" for each in found)
        lines.append(f"| {100 * share:g} % ({size}) | {cells} |")
    table = "\n".join(lines) + "\n"
    given.out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def _name(method: str, refit: bool) -> str:
    return f"{method}{' + refit' if refit else ''}"


def _cut(parent: Parent, size: int, way: tuple[str, bool], fitted: list[Batch]) -> dict[str, Any]:
    method, refit = way
    started = time.perf_counter()
    small = lathe.resize(
        parent.model,
        d_model=size,
        method=method,
        refit=refit,
        calibrate=[batch.inputs for batch in fitted] if refit or method != "truncate" else (),
        own_form=True,
    )
    seconds = time.perf_counter() - started
    return {
        "perplexity": parent.perplexity(small),
        "parameters": parameters_of(small),
        "seconds": round(seconds, 1),
        "steps": [step.name for step in small.steps],
    }


def _words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description="The price of each way to cut the width.")
    words.add_argument("run", type=Path, help="a training run's directory")
    words.add_argument("--tokens", type=int, default=24_000, help="how much text the cuts are fitted on")
    words.add_argument("--held-tokens", type=int, default=20_000, help="how much text they are measured on")
    words.add_argument("--shares", type=lambda text: [float(each) for each in text.split(",")], default=list(SHARES))
    words.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md")
    return words.parse_args()


if __name__ == "__main__":
    main()
