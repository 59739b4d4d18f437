"""The journey, step by step; every number in its result was measured in the run that returns it.

text → tokenizer → training → the cut (beside a plain truncation) → healing → a Hugging Face directory → reload →
a few blanks filled in → a table. Nothing here knows a family: a `Story` says what is made, and what a model is asked
to show follows from the stacks that it has.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lathe.api.loading import load
from lathe.api.model import Model, parameter_count
from lathe.api.resizing import resize
from lathe.data import Batch, Batches, special_tokens, tokenise
from lathe.objectives import objective
from lathe.quickstart.corpus import Corpus, python_corpus
from lathe.quickstart.show import Example, examples
from lathe.quickstart.story import Story, story
from lathe.text.tokenizer import Tokenizer
from lathe.text.train import train_tokenizer
from lathe.train import Distillation, TrainSettings, evaluate, objective_loss, train

Advance = Callable[[int, str], None]
_CALIBRATION_BATCHES = 8
_SPEED_ROUNDS = 5
_VALIDATION_BATCHES = 16


class Reporter(Protocol):
    """How the journey tells what it is doing."""

    def say(self, line: str) -> None:
        """One line about what has been done."""
        ...

    def work(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show work of `total` units; the function yielded is told how many are done."""
        ...


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    parameters: int
    bytes: int  # of the weights' files
    loss: float  # validation, nats a target
    tokens_per_second: float  # reading the validation text


@dataclass
class Journey:
    """What the run measured."""

    family: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)  # what the cut did, and what it kept
    examples: list[Example] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    reload_error: float = 0.0  # the largest difference of a logit after a reload
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)


def run(family: str, folder: Path, *, seed: int, reporter: Reporter) -> Journey:
    """Take the journey and write its models below `folder`, which exists.

    Args:
        family: a story's name.
        seed: of the weights, the order of the text and what is hidden of it.
    """
    started = time.perf_counter()
    plot, journey = story(family), Journey(family, seed)
    reporter.say("reading the documentation and docstrings that this Python carries")
    corpus = python_corpus()
    tokenizer = _tokenizer(plot, corpus, reporter)
    model = Model(_architecture(plot, tokenizer), seed=seed, tokenizer=tokenizer)
    text = _Text(plot, corpus, tokenizer, model, seed)
    journey.facts |= _facts(plot, corpus, text, model)

    _learn(model, text.batches, plot.steps, plot, "train", journey, reporter, seed)
    truncated = resize(model, method="truncate", **plot.cut)
    calibration = [next(text.batches).inputs for _ in range(_CALIBRATION_BATCHES)]
    rotated = resize(model, calibrate=calibration, **plot.cut)
    journey.steps = [{"name": s.name, "exact": s.exact, **s.detail} for s in rotated.steps]
    reporter.say("; ".join(step.name for step in rotated.steps))

    models = {"parent": model, "truncated": truncated, "rotated": rotated}
    losses = {name: evaluate(each, text.validation).loss for name, each in models.items()}
    for name, each in models.items():
        each.save(folder / name)
    _learn(rotated, text.batches, plot.heal_steps, plot, "heal", journey, reporter, seed, teacher=model)
    rotated.save(folder / "healed")
    losses["healed"] = evaluate(rotated, text.validation).loss

    reporter.say("reloading what was saved, and timing it")
    reloaded = {name: load(folder / name) for name in losses}
    journey.reload_error = _largest_difference(rotated, reloaded["healed"], text.validation[0])
    speeds = _speeds(reloaded, text.validation)
    journey.rows = [
        Row(name, parameter_count(each), _weight_bytes(folder / name), losses[name], speeds[name])
        for name, each in reloaded.items()
    ]
    journey.examples = examples(corpus.validation, {name: reloaded[name] for name in ("parent", "healed")})
    journey.seconds = time.perf_counter() - started
    return journey


class _Text:
    """The text as token ids, packed into batches to train on and a fixed set to validate on."""

    def __init__(self, plot: Story, corpus: Corpus, tokenizer: Tokenizer, model: Model, seed: int) -> None:
        special = special_tokens(tokenizer, model.architecture)
        learnt = objective(plot.objective, special)
        self.train = tokenise(tokenizer, corpus.train)
        self.batches = Batches(self.train, learnt, length=plot.length, rows=plot.rows, seed=seed)
        held_out = Batches(tokenise(tokenizer, corpus.validation), learnt, length=plot.length, rows=plot.rows)
        self.validation = held_out.one_pass(_VALIDATION_BATCHES)


def _tokenizer(plot: Story, corpus: Corpus, reporter: Reporter) -> Tokenizer:
    reporter.say(f"training a tokenizer of {plot.vocab_size:,} pieces on {corpus.characters:,} characters")
    paragraphs = [line for document in corpus.train for line in document.splitlines()]
    return train_tokenizer(paragraphs, plot.vocab_size, convention=plot.convention, **plot.tokenizer)


def _architecture(plot: Story, tokenizer: Tokenizer) -> Any:
    tokens = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "mask": tokenizer.mask_id}
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return plot.architecture(tokenizer.vocab_size, {**tokens, "eos": eos})


def _learn(
    model: Model,
    batches: Iterator[Batch],
    steps: int,
    plot: Story,
    title: str,
    journey: Journey,
    reporter: Reporter,
    seed: int,
    teacher: Model | None = None,
) -> None:
    """Train, or heal where there is a teacher: half its distribution, half the labels, with Adafactor."""
    kind, lr = (plot.optimizer, plot.lr) if teacher is None else ("adafactor", plot.heal_lr)
    settings = TrainSettings.from_dict(
        {
            "steps": steps,
            "seed": seed,
            "dropout": 0.0,
            "optimizer": {"kind": kind, "lr": lr},
            "schedule": {"kind": "cosine", "warmup": max(steps // 20, 1)},
        }
    )
    curve = journey.curves.setdefault(title, [])
    with reporter.work("training" if teacher is None else "healing", steps) as advance:

        def on_step(report: Any) -> None:
            curve.append((report.step, report.loss))
            advance(1, f"loss {report.loss:.2f}, {report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s")

        loss = objective_loss if teacher is None else Distillation(teacher.eval())
        train(model, batches, settings, on_step=on_step, loss_fn=loss)
    model.eval()


def _speeds(models: dict[str, Model], batches: Sequence[Batch]) -> dict[str, float]:
    """Tokens read a second: the models take turns, and each one's median counts."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(_SPEED_ROUNDS + 1):
            for name, model in models.items():
                started = time.perf_counter()
                for batch in batches[:4]:
                    model(**batch.inputs)
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    tokens = sum(batch.tokens for batch in batches[:4])
    return {name: tokens / statistics.median(each) for name, each in seconds.items()}


def _largest_difference(one: Model, other: Model, batch: Batch) -> float:
    with torch.no_grad():
        return float((one(**batch.inputs).logits - other(**batch.inputs).logits).abs().max())


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _facts(plot: Story, corpus: Corpus, text: _Text, model: Model) -> dict[str, str]:
    tokens = text.train.n_tokens
    return {
        "text": f"{len(corpus.train):,} documents, {corpus.characters:,} characters, {tokens:,} tokens",
        "model": f"{plot.preset} made small: {parameter_count(model):,} parameters",
        "cut": ", ".join(f"{name} to {value}" for name, value in plot.cut.items()),
        "training": f"{plot.steps} steps of {plot.rows} rows of {plot.length} tokens, then {plot.heal_steps} to heal",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}",
    }
