"""A job's work, stage by stage: cut, measure, heal; and the directory that it ends in.

What is measured after each operation is the model as it is then: its loss on text that fitted nothing, and how far
its logits moved. The files are then opened as a user would open them, by Lathe and by stock `transformers` where it
is installed, and compared with the model that was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lathe.adapt.opening import open_adapted
from lathe.blueprint import stored
from lathe.checkpoint.layout import find_weights
from lathe.checkpoint.save import DEFAULT_SHARD_BYTES
from lathe.data.batch import Batch
from lathe.model.transformer import Transformer
from lathe.planner.quantities import bytes_text
from lathe.reshape.heal import Healing, HealSettings, heal
from lathe.reshape.history import History, Made, Reading, described, outcome_of, write
from lathe.reshape.job import Job, Reporter, recipe_of
from lathe.reshape.kept import keep_request
from lathe.reshape.measure import (
    is_two_sided,
    logits_of,
    parameters_of,
    quality,
    sample_ids,
    speeds,
    weight_bytes,
)
from lathe.reshape.outcome import Outcome, Size
from lathe.reshape.recipe import Recipe, require_same
from lathe.reshape.resize import Resized, resize
from lathe.reshape.share_remainder import REMAINDER, kept_remainder
from lathe.reshape.source import open_source
from lathe.reshape.state import Step
from lathe.reshape.stream import weights_of, whole
from lathe.reshape.text import endless, healing_text, lay
from lathe.reshape.vocabulary import renumbered_settings, settings_ids
from lathe.text.tokenizer import Tokenizer
from lathe.train.loop import StepReport
from lathe.train.machine import pick_device

log = logging.getLogger("lathe")

_MORE = 1.05  # a file may lack a few tensors, which are made
_PARTS = 1000  # of a healing that is not counted in steps
_NO_BETTER = 0.01  # nats
_MANY_TIMES = 10  # that a text is read, and it is said


def carry_out(job: Job, folder: Path, run: Path, reporter: Reporter, name: str) -> tuple[Outcome, Recipe]:
    """Cut the job's model and write it into `folder`, which is there and empty.

    Args:
        run: where healing keeps its checkpoints.
        name: what the result is called.
    """
    work = Work(job, reporter)
    for stage in job.stages:
        if "resize" in stage:
            work.resize(stage["resize"])
        else:
            work.heal(stage["heal"], run, stage.get("sha256"))
    assert job.source.directory is not None
    saved, digests = write(work.made, work.history, folder, max_shard_bytes=shard_bytes(job.source.directory))
    if job.expected is not None:
        work.compare_with(job.expected.weights, digests)
    streamed = job.is_streamed
    reporter.say("opening what was written" + ("" if streamed else ", and timing it beside the source"))
    if work.made.relaxed is None:
        reloaded = open_source(str(folder), stream=streamed).model
    else:
        reloaded, _ = open_adapted(str(folder), folder / REMAINDER)
    speed = {} if streamed else work.timed(reloaded)  # else it would be the disk's speed
    work.finish()
    outcome = outcome_of(work.made, work.history, folder, saved, name, reloaded, speed=speed, streamed=streamed)
    return outcome, work.history.recipe


class Work:
    """A job's model as it is by now, and its history."""

    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job, self.reporter = job, reporter
        source, request = job.source, job.request
        self.model: Transformer = source.model
        self.tokenizer = source.tokenizer
        # The source with the vocabulary of today, and the settings with its ids.
        self.teacher: Transformer = source.model
        self.generation, self.config = source.generation, source.config
        self.relaxed: Transformer | None = None
        self._read_so_far: dict[str, Any] = {}  # of the text that is healed on
        reading = Reading(job.held, request.data or request.calibrate, request.objective, request.seed, job.apart)
        held = reading.laid(self.model, self.tokenizer)
        before = None if held is None else quality(self.model, held)
        self._say_if_widened()
        self.history = History(
            Size(source.name, parameters_of(self.model), _bytes_of(job), before),
            job.shown_changes,
            _card_of(source.directory),
            source.hub_id,
            recipe_of(job),
            reading,
        )
        self._logits = logits_of(self.model, reading.ids(self.model, self.tokenizer), both=is_two_sided(self.model))
        if job.rows:
            self.history.facts["rows"] = job.rows
            reporter.say(f"rows {job.rows}")
        if before is not None:
            reporter.say(f"{source.name}: {parameters_of(self.model):,} parameters, loss {before.loss:.4f}")
            self._say_if_it_guesses(before.loss)

    @property
    def made(self) -> Made:
        """What is to be written."""
        return Made(self.model, self.tokenizer, self.generation, self.config, self.relaxed)

    # --- stages

    def resize(self, changes: Mapping[str, Any]) -> Resized:
        """Cut or grow, and measure after each operation."""
        job, request = self.job, self.job.request
        fitted = None
        if job.fitted is not None and request.calibrate is not None and self.tokenizer is not None:
            fitted = lay(job.fitted, request.calibrate, self.model.architecture, self.tokenizer, request.objective)
            self.history.facts |= {"fitted on": described(fitted, request.calibrate)}
        operations: list[dict[str, Any]] = []

        def after(model: Transformer, tokenizer: Tokenizer | None, steps: Sequence[Step]) -> None:
            operations.extend({"name": step.name, "exact": step.exact} for step in steps)
            self._measure(model, tokenizer, steps)

        is_first = not any("resize" in stage for stage in self.history.recipe.stages)
        self.reporter.say("resizing: " + ", ".join(f"{name}={value}" for name, value in self.history.changes.items()))
        parent = self.model
        done = resize(
            self.model,
            changes,
            calibrate=list(job.batches) if fitted is None else fitted.inputs,
            **request.how,
            seed=request.seed,
            tokenizer=self.tokenizer,
            own_form=request.own_form,
            vocabulary=job.vocabulary if is_first else None,
            reserved=settings_ids(self.generation) | settings_ids(self.config),
            after=after,
        )
        if done.vocabulary is not None:
            if request.heal is not None:
                self.teacher = done.vocabulary.model(self.teacher)
            self.generation = renumbered_settings(self.generation, done.vocabulary.ids)
            self.config = renumbered_settings(self.config, done.vocabulary.ids)
        self.model, self.tokenizer = done.model(), done.tokenizer
        if request.remainder is not None:
            self._keep_remainder(parent, request.remainder, operations)
        self._note({"resize": dict(changes), "operations": operations})
        return done

    def heal(self, settings: HealSettings, run: Path, expected: str | None) -> None:
        """Learn from the source model for a while."""
        assert self.tokenizer is not None
        documents = healing_text(settings.text, self.tokenizer, self.history.reading.apart)
        if expected is not None:
            require_same(settings.file, expected, documents.digest)
        # A streamed parent is read anew for every batch, layer by layer, into this machine's memory.
        device = torch.device("cpu") if self.job.is_streamed else pick_device(self.job.request.device)
        asked = self.job.request.objective
        batches = endless(documents, settings.text, self.model.architecture, self.tokenizer, asked)
        again = settings.whole is not None and bool(self._read_so_far)
        if again and self._read_so_far["data"] == batches.state_dict()["data"]:
            batches.load_state_dict(self._read_so_far)  # the stage before it stopped there
        elif again:
            self.reporter.say("the rows are others than in the stage before: the text is read from its beginning")
        times = settings.text.tokens / max(batches.corpus.n_tokens, 1)
        if times >= _MANY_TIMES and not again:
            self.reporter.say(
                f"{settings.file} holds {batches.corpus.n_tokens:,} tokens and is read up to {times:.0f} times: more "
                "text heals better"
            )
        keep_request(self.job, run)
        number = 1 + sum("heal" in stage for stage in self.history.recipe.stages)
        model, title = whole(self.model).to(device), f"healing {number}"
        total = settings.most_steps or _PARTS
        with self.reporter.work(title, total) as advance:
            shown = 0

            def on_step(report: StepReport) -> None:
                nonlocal shown
                done = int(report.progress * total + 1e-6)
                advance(done - shown, f"loss {report.loss:.3f}")
                shown = done

            done = heal(
                model,
                self.teacher,
                batches,
                settings,
                run / f"stage-{number}",
                tokenizer=self.tokenizer,
                config=self.config,
                asked={"cut": _asked_of(self.history.recipe)},
                on_step=on_step,
            )
        self._read_so_far = batches.state_dict()
        self.model = model.to("cpu")
        self.history.curves[title] = done.curve
        self._measure(self.model, self.tokenizer, [healed_step(done)], heals=True)
        self._note({"heal": settings.to_dict(), "sha256": documents.digest, "documents": len(documents.texts)})

    def compare_with(self, then: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Say whether a replay came out as the recipe's own run did."""
        if dict(then) == dict(now):
            self.history.facts["replay"] = "the weights are, byte for byte, those that the recipe was written for"
            self.reporter.say(self.history.facts["replay"])
            return
        self.history.facts["replay"] = "the weights differ from those that the recipe was written for"
        log.warning(
            "%s; another machine, release of torch or number of threads rounds sums otherwise",
            self.history.facts["replay"],
        )

    def finish(self) -> None:
        """Write down on what, and where, all of it was measured."""
        device = pick_device(self.job.request.device)
        self.history.facts |= self.history.reading.facts(self.model, self.tokenizer)
        machine = f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        self.history.facts["machine"] = machine

    def timed(self, reloaded: Transformer) -> dict[str, float]:
        """Tokens a second of the source and of what was read from the files, in turns."""
        device, source = pick_device(self.job.request.device), self.job.source
        pairs = {
            "source": (source.model.to(device), self._timing(source.model, source.tokenizer)),
            "result": (reloaded.to(device), self._timing(reloaded, self.tokenizer)),
        }
        found = speeds(pairs)
        source.model.to("cpu")
        reloaded.to("cpu")
        return found

    # --- measurements

    def _measure(
        self, model: Transformer, tokenizer: Tokenizer | None, steps: Sequence[Step], *, heals: bool = False
    ) -> None:
        before = None if tokenizer is not self.tokenizer else self._logits
        self._logits = self.history.note(model, tokenizer, list(steps), before, heals=heals)
        self.tokenizer = tokenizer
        self._say(steps)

    def _say_if_it_guesses(self, loss: float) -> None:
        """What a cut of a model costs on a text that tells it nothing is no measurement."""
        size = self.model.architecture.embedding.vocab_size
        if self.model.architecture.head.language is not None and loss > math.log(size) - _NO_BETTER:
            self.history.facts["guessing"] = (
                f"the source's loss is no better than that of a guess among {size:,} tokens; is it asked what it was "
                "trained on? objective= says the task, and calibrate.source=, calibrate.target= and calibrate.prefix= "
                "make pairs of the text"
            )
            self.reporter.say(self.history.facts["guessing"])

    def _say_if_widened(self) -> None:
        """Files of several types are read as the widest of them, and a cut may take more bytes than they do."""
        model = self.job.source.model
        wide = model.dtype.itemsize * sum(parameter.size for parameter in stored(model.architecture))
        if wide > _MORE * (held := _bytes_of(self.job)):
            dtype = str(model.dtype).removeprefix("torch.")
            self.reporter.say(
                f"{self.job.source.name} holds several types, and all of it is read and written as {dtype}: "
                f"{bytes_text(wide)} in place of {bytes_text(held)}"
            )

    def _say(self, steps: Sequence[Step]) -> None:
        found = self.history.steps[-1].quality
        loss = "" if found is None else f": loss {found.loss:.4f}"
        self.reporter.say("; ".join(step.name for step in steps) + loss)

    def _note(self, stage: dict[str, Any]) -> None:
        recipe = self.history.recipe
        self.history.recipe = dataclasses.replace(recipe, stages=[*recipe.stages, stage])

    def _keep_remainder(self, parent: Transformer, rank: int, operations: list[dict[str, Any]]) -> None:
        """What the layers that now share weights differed by, as an adapter beside them."""
        self.relaxed, step, extra = kept_remainder(parent, self.model, rank, self.job.request.share)
        operations.append({"name": step.name, "exact": step.exact})
        size = parameters_of(self.model) + extra
        self._logits = self.history.note(self.relaxed, self.tokenizer, [step], self._logits, parameters=size)
        self.history.facts["remainder"] = (
            f"{REMAINDER}/, a LoRA adapter of {extra:,} parameters for the layers unshared"
        )
        self._say([step])

    def _timing(self, model: Transformer, tokenizer: Tokenizer | None) -> Sequence[Batch]:
        held = self.history.reading.laid(model, tokenizer)
        if held is not None:
            return held.batches
        ids = sample_ids(model, None, self.job.request.seed).repeat(4, 1)
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if is_two_sided(model) else {})}
        return [Batch(inputs, ids.numel() * (2 if is_two_sided(model) else 1), 0, "drawn ids")]


def healed_step(done: Healing) -> Step:
    """The line about a healing."""
    return Step(f"heal for {done.steps:,} steps on {done.tokens:,} tokens", False, {})


def _asked_of(recipe: Recipe) -> str:
    """The SHA-256 of all that the weights of a cut and of its teacher follow from, wherever the files lie by now.

    The weights themselves will not do: on another number of threads the same cut has other last bits.
    """
    asked: dict[str, Any] = {"source": recipe.source["sha256"], "stages": recipe.stages, "how": recipe.how}
    for name in ("calibrate", "vocabulary"):
        asked[name] = {key: value for key, value in (getattr(recipe, name) or {}).items() if key != "file"}
    asked |= {"seed": recipe.seed, "objective": recipe.objective}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _bytes_of(job: Job) -> int:
    """Bytes of the source's weights: of its files, or in memory."""
    if job.source.directory is not None:
        return weight_bytes(job.source.directory)
    return sum(tensor.nbytes for tensor in weights_of(job.source.model).values())


def shard_bytes(source: Path) -> int:
    """The result's shards are no larger than the source's: whoever had room for those has room for these."""
    files = find_weights(source).files
    return max(file.stat().st_size for file in files) if len(files) > 1 else DEFAULT_SHARD_BYTES


class _Words(yaml.SafeLoader):
    """YAML in which `no` is Norwegian, as the cards of the hub write it, and not false."""

    def construct_yaml_bool(self, node: Any) -> Any:
        """As it is written."""
        return self.construct_scalar(node)


_Words.add_constructor("tag:yaml.org,2002:bool", _Words.construct_yaml_bool)


# What of a source's model card is true of a model made from it.
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "widget")


def _card_of(directory: Path | None) -> dict[str, Any]:
    """Licence, language and the like, from the header of the source's README.md; nothing where it has none."""
    file = None if directory is None else directory / "README.md"
    if file is None or not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return {}
    try:
        header = yaml.load(text[4 : text.index("\n---", 3)], Loader=_Words)
    except yaml.YAMLError as error:
        log.warning("the header of %s is not YAML (%s): its licence is not carried over", file, type(error).__name__)
        return {}
    return {key: header[key] for key in _KEPT if key in header} if isinstance(header, dict) else {}
