"""What int8 and int4 cost: loss over the float model's, and bytes, on text that no code was chosen on.

    python results/quantize.py bert --out quantize-bert

Quantises the model that a run left in several ways; codes are chosen on the run's training text, measured on what it
validates on. The table goes to stdout and to OUT.md, the numbers to OUT.json after every way, so that an interrupted
run goes on where it was.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from parent import Ledger, Parent, open_parent

import lathe
from lathe.data.batch import Batch
from lathe.reshape.measure import weight_bytes
from lathe.train.evaluate import evaluate

# What is asked, and whether text is shown.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "int8, int8 activations": ({"bits": 8}, False),
    "int8, weights alone": ({"bits": 8, "activations": "none"}, False),
    "int4, groups of 32, nearest": ({"bits": 4}, False),
    "int4, groups of 32, GPTQ": ({"bits": 4}, True),
    "int4, groups of 32, zero points, GPTQ": ({"bits": 4, "symmetric": False}, True),
    "int4, groups of 64, GPTQ": ({"bits": 4, "group": 64}, True),
    "int4, groups of 32, tables too, GPTQ": ({"bits": 4, "tables": 4}, True),
}


def main() -> None:
    """Quantise, measure, and print the table."""
    given = _words()
    parent = open_parent(given.run, given.held_tokens)
    ledger = Ledger(given.out.with_suffix(".json"))
    whole = ledger.once("parent", _measured, parent, parent.model)
    fitted = parent.sample(given.tokens)
    counts = [sum(batch.tokens for batch in batches) for batches in (fitted, parent.held)]
    lines = [
        f"{parent}; codes chosen on {counts[0]:,} tokens, measured on {counts[1]:,}.",
        "",
        "| | bytes | | loss | |",
        "|---|---:|---:|---:|---:|",
        f"| float | {whole['bytes']:,} | | {whole['loss']:.4f} | |",
    ]
    for name, (how, is_shown) in WAYS.items():
        found = ledger.once(name, _quantised, parent, how, fitted if is_shown else [])
        share, rise = found["bytes"] / whole["bytes"], found["loss"] / whole["loss"] - 1
        lines.append(f"| {name} | {found['bytes']:,} | ×{share:.2f} | {found['loss']:.4f} | {rise:+.2%} |")
    table = "\n".join(lines) + "\n"
    given.out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def _quantised(parent: Parent, how: dict[str, Any], fitted: list[Batch]) -> dict[str, Any]:
    started = time.perf_counter()
    small = lathe.quantize(parent.model, calibrate=[batch.inputs for batch in fitted], **how)
    seconds = time.perf_counter() - started
    return {**_measured(parent, small), "seconds": round(seconds, 1)}


def _measured(parent: Parent, model: lathe.Model) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model")
        return {"loss": evaluate(model, parent.held).loss, "bytes": weight_bytes(Path(folder, "model"))}


def _words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description="The price of int8 and int4.")
    words.add_argument("run", type=Path, help="a training run's directory")
    words.add_argument("--tokens", type=int, default=24_000, help="how much text codes are chosen on")
    words.add_argument("--held-tokens", type=int, default=20_000, help="how much text they are measured on")
    words.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md")
    return words.parse_args()


if __name__ == "__main__":
    main()
