"""The parent of an experiment: what a run left, on the run's own data and objective.

A run's directory holds what it was asked (`run.json`), so it is all that an experiment needs to be told.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import lathe
from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.reshape.measure import parameters_of
from lathe.train.evaluate import evaluate
from lathe.train.job import open_job
from lathe.train.request import RunSettings, read_request

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Parent:
    """A trained model with its run.

    Args:
        model: the last checkpoint, at the end of its schedule.
        request: what the run was asked.
        held: batches that nothing was trained on.
    """

    model: lathe.Model
    run: Path
    request: RunSettings
    held: list[Batch]

    @property
    def tokens(self) -> int:
        """How many tokens it was trained on."""
        return trained_tokens(self.run)

    def __str__(self) -> str:
        sizes = f"d_model {self.model.architecture.d_model}, {parameters_of(self.model):,} parameters"
        return f"Parent: {sizes}, trained on {self.tokens:,} tokens"

    def batches(self) -> Batches:
        """The run's batches from the first on, as a new object."""
        return open_job(asked(self.request, out=str(self.run))).batches

    def sample(self, tokens: int) -> list[Batch]:
        """So many tokens of the training text, for fits and measurements."""
        taken, found = 0, []
        for batch in self.batches():
            if taken >= tokens:
                break
            found.append(batch)
            taken += batch.tokens
        return found

    def perplexity(self, model: lathe.Model | None = None) -> float:
        """On `held`, of another model or its own."""
        return evaluate(model or self.model, self.held).perplexity


def open_parent(run: Path, held_tokens: int) -> Parent:
    """Open a run that has ended."""
    request = read_request(json.loads((run / "run.json").read_text(encoding="utf-8")), {})
    done = trained_tokens(run)
    if request.tokens is not None and done < request.tokens:
        raise SystemExit(f"{run} is at {done:,} of {request.tokens:,} tokens: let it end first")
    job = open_job(asked(request, out=str(run), **{"data.validation_batches": None}))
    assert job.evaluation is not None
    counts = itertools.accumulate(batch.tokens for batch in job.evaluation)
    enough = next((n for n, count in enumerate(counts, start=1) if count >= held_tokens), len(job.evaluation))
    return Parent(lathe.load(run / "checkpoints/last"), run, request, job.evaluation[:enough])


def trained_tokens(run: Path) -> int:
    """How many tokens a run has trained on."""
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return int(json.loads(last)["tokens"])


def asked(request: RunSettings, **changes: Any) -> RunSettings:
    """The same request with other values."""
    return read_request(request.to_dict(), changes)


def width(model: lathe.Model, share: float) -> int:
    """The width nearest to a share of the model's that its heads, which have to fill it in some files, can fill."""
    heads = 1
    for _, stack in model.architecture.stacks:
        if stack.attention.d_q == model.architecture.d_model:
            heads = max(heads, stack.attention.n_heads * (2 if stack.positions.kind == "rotary" else 1))
    return max(heads, round(share * model.architecture.d_model / heads) * heads)


def copied(model: lathe.Model) -> lathe.Model:
    """The same model with weights of its own."""
    tensors = {key: tensor.clone() for key, tensor in model.tensors().items()}
    return lathe.Model(model.architecture, tensors, tokenizer=model.tokenizer)


def numbers(text: str) -> list[float]:
    """What a word of the command line lists, as 0.05,0.2."""
    return [float(each) for each in text.split(",") if each]


class Ledger:
    """Numbers by name, in a file that is written after each: what was measured once is not measured again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def once(self, name: str, measure: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What is under that name, measured if nothing is."""
        if name not in self.values:
            self.values[name] = measure(*args, **kwargs)
            self.file.write_text(json.dumps(self.values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{name}: {self.values[name]}", flush=True)
        found: T = self.values[name]
        return found
