"""What each way to cut the width costs, without healing: perplexity over the parent's, on text that fitted nothing.

    python results/width.py t5/checkpoints/best --text train.jsonl.gz --held valid.jsonl.gz --out width-t5
    python results/width.py t5/checkpoints/best --text pairs.jsonl.gz --held pairs-valid.jsonl.gz \
        --source en --target ko --prefix "translate English to Korean: " --out width-t5

Cuts to 87.5, 75, 62.5, 50 and 37.5% (rounded to what the heads can fill) with truncate, select and rotate, each with
and without the least-squares refit. A table goes to stdout, and to OUT.md with the numbers in OUT.json, which are
written after every cut, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lathe
from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.data.corpus import Corpus
from lathe.data.sources import read
from lathe.data.tokenise import special_tokens
from lathe.objectives.by_name import objective
from lathe.reshape.measure import parameters_of
from lathe.reshape.text import TextSettings, lay, read_documents
from lathe.train.evaluate import evaluate

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375)
METHODS = ("truncate", "select", "rotate")


def main() -> None:
    """Cut, measure, and print the table."""
    given = _words()
    model = lathe.load(given.parent)
    fitted = _batches(model, given, given.text, given.field, given.tokens, seed=0)
    held = _batches(model, given, given.held, given.held_field or given.field, given.held_tokens, seed=1)
    file = given.out.with_suffix(".json")
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not done:
        found = evaluate(model, held)
        done = {
            "parent": {"d_model": model.architecture.d_model, "parameters": parameters_of(model), "loss": found.loss},
            "perplexity": found.perplexity,
            "tokens": {"fitted": sum(b.tokens for b in fitted), "held": sum(b.tokens for b in held)},
            "cuts": {},
        }
    for share in given.shares:
        width = _width(model, share)
        for method in given.methods:
            for refit in given.refit:
                key = f"{share:g} {method}{' + refit' if refit else ''}"
                if key not in done["cuts"]:
                    done["cuts"][key] = _cut(model, width, method, refit, fitted, held, done["perplexity"])
                    print(f"{key}: {done['cuts'][key]['ratio']:.4f}", flush=True)
                    file.write_text(json.dumps(done, indent=1) + "\n")
    table = _table(done)
    given.out.with_suffix(".md").write_text(table)
    print(table)


def _cut(
    model: lathe.Model, width: int, method: str, refit: bool, fitted: list[Batch], held: list[Batch], parents: float
) -> dict[str, Any]:
    started = time.perf_counter()
    small = lathe.resize(
        model,
        d_model=width,
        method=method,
        refit=refit,
        calibrate=[batch.inputs for batch in fitted] if refit or method != "truncate" else (),
        own_form=True,
    )
    seconds = time.perf_counter() - started
    found = evaluate(small, held)
    return {
        "d_model": width,
        "parameters": parameters_of(small),
        "loss": found.loss,
        "ratio": found.perplexity / parents,
        "seconds": round(seconds, 1),
        "steps": [step.name for step in small.steps],
    }


def _width(model: lathe.Model, share: float) -> int:
    """The width nearest to a share of the parent's that the heads, which have to fill it in some files, can fill."""
    heads = 1
    for _, stack in model.architecture.stacks:
        if stack.attention.d_q == model.architecture.d_model:
            heads = max(heads, stack.attention.n_heads * (2 if stack.positions.kind == "rotary" else 1))
    return max(heads, round(share * model.architecture.d_model / heads) * heads)


def _batches(
    model: lathe.Model, given: argparse.Namespace, file: str, field: str, tokens: int, *, seed: int
) -> list[Batch]:
    assert model.tokenizer is not None
    if given.source is None:
        settings = TextSettings(file=file, field=field, tokens=tokens, length=given.length, rows=8, seed=seed)
        documents, _ = read_documents(settings, model.tokenizer, apart=False)
        return lay(documents, settings, model.architecture, model.tokenizer, given.objective).batches
    columns: dict[str, list[list[int]]] = {"source": [], "target": []}
    taken = 0
    for record in read(file, fields={"source": given.source, "target": given.target}):
        if taken >= tokens:
            break
        pair = (given.prefix + record["source"], record["target"])
        ids = model.tokenizer.encode_batch(list(pair), add_special_tokens=False)
        for column, each in zip(columns.values(), ids):
            column.append(list(each))
            taken += len(each)
    length = given.length or 256
    made = objective(
        "seq2seq", special_tokens(model.tokenizer, model.architecture), max_source=length, max_target=length
    )
    corpus = Corpus.of(model.tokenizer.vocab_size, **columns)
    return Batches(corpus, made, length=length, target_length=length, rows=8, seed=seed).one_pass()


def _table(done: Mapping[str, Any]) -> str:
    columns = [f"{method}{refit}" for method in METHODS for refit in ("", " + refit")]
    columns = [name for name in columns if any(key.split(" ", 1)[1] == name for key in done["cuts"])]
    parent, tokens = done["parent"], done["tokens"]
    of = (
        f"Parent: d_model {parent['d_model']}, {parent['parameters']:,} parameters, perplexity {done['perplexity']:.3f}"
    )
    lines = [
        f"{of}; fitted on {tokens['fitted']:,} tokens, measured on {tokens['held']:,}.",
        "",
        "| width | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for share in dict.fromkeys(key.split(" ", 1)[0] for key in done["cuts"]):
        row = [done["cuts"].get(f"{share} {name}") for name in columns]
        width = next(cut["d_model"] for cut in row if cut)
        cells = " | ".join(f"{cut['ratio']:.3f}" if cut else "" for cut in row)
        lines.append(f"| {100 * float(share):g}% ({width}) | {cells} |")
    return "\n".join(lines) + "\n"


def _words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description="The price of each way to cut the width.")
    words.add_argument("parent", help="a model's directory, or a hub id")
    words.add_argument("--text", required=True, help="text that the cuts are fitted on")
    words.add_argument("--held", required=True, help="text that they are measured on")
    words.add_argument("--field", default="text", help="the column of the text")
    words.add_argument("--held-field", help="the column of the text to measure on, if another")
    words.add_argument("--source", help="for pairs: the column that is read")
    words.add_argument("--target", help="for pairs: the column that is written")
    words.add_argument("--prefix", default="", help="for pairs: what stands before the source")
    words.add_argument("--objective", type=json.loads, help='such as {"name": "masked", "rate": 0.2}')
    words.add_argument("--tokens", type=int, default=16_384)
    words.add_argument("--held-tokens", type=int, default=16_384)
    words.add_argument("--length", type=int, help="positions of a row")
    words.add_argument("--shares", type=lambda text: [float(each) for each in text.split(",")], default=list(SHARES))
    words.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    words.add_argument("--refit", choices=("both", "yes", "no"), default="both")
    words.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md")
    given = words.parse_args()
    given.refit = {"both": (False, True), "yes": (True,), "no": (False,)}[given.refit]
    if given.source is not None and given.target is None:
        words.error("--source needs --target")
    return given


if __name__ == "__main__":
    main()
