"""A resize job's work, inside the directory that will be the result: cut, measure, heal, write, open again.

What is measured after each operation is the model as it is then: its loss on text that fitted nothing, and how far
its logits moved. The files are then opened as a user would open them, by Lathe and by stock `transformers` where it
is installed, and compared with the model that was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lathe.checkpoint.layout import find_weights
from lathe.checkpoint.load import CONFIG, OWN
from lathe.checkpoint.save import DEFAULT_SHARD_BYTES, Saved, write_checkpoint
from lathe.data.batch import Batch
from lathe.model.transformer import Transformer
from lathe.reshape.heal import HealSettings, heal
from lathe.reshape.job import Job, Reporter, open_source, recipe_of
from lathe.reshape.measure import (
    Quality,
    change,
    logits_of,
    parameters_of,
    quality,
    sample_ids,
    speeds,
    weight_bytes,
)
from lathe.reshape.outcome import Done, Outcome, Reload, Size
from lathe.reshape.recipe import Recipe, require_same, weight_digests, written
from lathe.reshape.resize import Resized, resize
from lathe.reshape.spill import Tensors
from lathe.reshape.state import Step
from lathe.reshape.stream import StreamedTransformer, weights_of
from lathe.reshape.text import Documents, Text, TextSettings, endless, lay, read_documents
from lathe.reshape.vocabulary import renumbered_settings, settings_ids
from lathe.text.tokenizer import Tokenizer
from lathe.train.loop import StepReport
from lathe.train.machine import pick_device

log = logging.getLogger("lathe")

_PARTS = 1000  # of a healing that is not counted in steps


def carry_out(job: Job, folder: Path, run: Path, reporter: Reporter, name: str) -> tuple[Outcome, Recipe]:
    """Cut the job's model and write it into `folder`, which is there and empty.

    Args:
        run: where healing keeps its checkpoints.
        name: what the result is called.
    """
    work = _Work(job, run, reporter)
    for stage in job.stages:
        if "resize" in stage:
            work.resize(stage["resize"])
        else:
            work.heal(stage["heal"], stage.get("sha256"))
    recipe = dataclasses.replace(recipe_of(job), stages=work.stages)
    saved = write_checkpoint(
        folder,
        work.model.architecture,
        weights_of(work.model),
        tokenizer=work.tokenizer,
        generation=work.generation,
        config=work.config,
        max_shard_bytes=_shard_bytes(job.source.directory),
    )
    digests = weight_digests(folder)
    beside = {} if saved.stock else {"architecture": work.model.architecture.to_dict()}
    (folder / OWN).write_text(written(recipe, digests, beside), encoding="utf-8")
    if job.expected is not None:
        work.compare_with(job.expected.weights, digests)
    return work.outcome(folder, saved, name), recipe


class _Work:
    """The model as it is by now, and what was found on the way."""

    def __init__(self, job: Job, run: Path, reporter: Reporter) -> None:
        self.job, self.run, self.reporter = job, run, reporter
        self.model: Transformer = job.source.model
        self.tokenizer = job.source.tokenizer
        # The source with the vocabulary of today, and the settings with its ids.
        self.teacher: Transformer = job.source.model
        self.generation, self.config = job.source.generation, job.source.config
        self.stages: list[dict[str, Any]] = []
        self.steps: list[Done] = []
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.facts: dict[str, str] = {}
        self.before: Quality | None = self._quality(self.model, self.tokenizer)
        self._ids = sample_ids(self.model, self._held(self.model, self.tokenizer), job.request.seed)
        self._logits = self._sampled(self.model)
        if self.before is not None:
            reporter.say(f"{job.source.name}: {parameters_of(self.model):,} parameters, loss {self.before.loss:.4f}")

    # --- stages

    def resize(self, changes: Mapping[str, Any]) -> None:
        """Cut or grow, and measure after each operation."""
        request = self.job.request
        fitted = self._laid(self.job.fitted, request.calibrate, self.model, self.tokenizer)
        operations: list[dict[str, Any]] = []

        def after(model: Transformer, tokenizer: Tokenizer | None, steps: Sequence[Step]) -> None:
            operations.extend({"name": step.name, "exact": step.exact} for step in steps)
            self._measure(model, tokenizer, steps)

        self.reporter.say("resizing: " + ", ".join(f"{name}={value}" for name, value in changes.items()))
        done = resize(
            self.model,
            changes,
            calibrate=[] if fitted is None else fitted.inputs,
            **request.how,
            seed=request.seed,
            tokenizer=self.tokenizer,
            own_form=request.own_form,
            reserved=settings_ids(self.generation) | settings_ids(self.config),
            after=after,
        )
        if done.vocabulary is not None:
            self.teacher = done.vocabulary.model(self.teacher)
            self.generation = renumbered_settings(self.generation, done.vocabulary.ids)
            self.config = renumbered_settings(self.config, done.vocabulary.ids)
        self.model, self.tokenizer = _made(done), done.tokenizer
        if fitted is not None:
            self.facts |= {"fitted on": _described(fitted, request.calibrate)}
        self.stages.append({"resize": dict(changes), "operations": operations})

    def heal(self, settings: HealSettings, expected: str | None) -> None:
        """Learn from the source model for a while."""
        assert self.tokenizer is not None
        documents = self._healing_text(settings)
        if expected is not None:
            require_same(settings.file, expected, documents.digest)
        device = pick_device(self.job.request.device)
        asked = self.job.request.objective
        batches = endless(documents, settings.text, self.model.architecture, self.tokenizer, asked)
        number = 1 + sum("heal" in stage for stage in self.stages)
        known = {"source": self.job.source_sha256, "stages": self.stages, "fitted": self._fitted_digest()}
        dtype, model, teacher = self.model.dtype, self.model.float().to(device), self.teacher.to(device)
        title, curve = f"healing {number}", list[tuple[int, float]]()
        total = settings.training().steps or _PARTS
        with self.reporter.work(title, total) as advance:
            shown = 0

            def on_step(report: StepReport) -> None:
                nonlocal shown
                curve.append((report.step, report.loss))
                done = int(report.progress * total + 1e-6)
                advance(done - shown, f"loss {report.loss:.3f}")
                shown = done

            heal(
                model,
                teacher,
                batches,
                settings,
                self.run / f"stage-{number}",
                tokenizer=self.tokenizer,
                config=self.config,
                asked={"cut": hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()},
                on_step=on_step,
            )
        self.teacher.to("cpu")
        self.model = model.to("cpu", dtype).eval()
        self.curves[title] = curve or _curve_of(self.run / f"stage-{number}")
        steps, tokens = _spent(self.run / f"stage-{number}")
        name = f"heal for {steps:,} steps on {tokens:,} tokens"
        self._measure(self.model, self.tokenizer, [Step(name, False, {})], heals=True)
        self.stages.append({"heal": settings.to_dict(), "sha256": documents.digest, "documents": len(documents.texts)})

    def compare_with(self, then: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Say whether a replay came out as the recipe's own run did."""
        if dict(then) == dict(now):
            self.facts["replay"] = "the weights are, byte for byte, those that the recipe was written for"
            self.reporter.say(self.facts["replay"])
            return
        self.facts["replay"] = "the weights differ from those that the recipe was written for"
        log.warning(
            "%s; another machine, release of torch or number of threads rounds sums otherwise", self.facts["replay"]
        )

    # --- the result

    def outcome(self, folder: Path, saved: Saved, name: str) -> Outcome:
        """What was done, with the files opened again and timed beside the source."""
        job = self.job
        self.reporter.say(
            "opening what was written" + ("" if job.request.stream else ", and timing it beside the source")
        )
        reloaded = open_source(str(folder), stream=job.request.stream).model
        reload = self._reloaded(folder, saved, reloaded)
        device = pick_device(job.request.device)
        speed: dict[str, float] = {}
        if not job.request.stream:  # else it would be the disk's speed
            pairs = {
                "source": (job.source.model.to(device), self._timed(job.source.model, job.source.tokenizer)),
                "result": (reloaded.to(device), self._timed(reloaded, self.tokenizer)),
            }
            speed = speeds(pairs)
            job.source.model.to("cpu")
        held = self._held(self.model, self.tokenizer)
        if held is not None:
            self.facts["measured on"] = _described(held, job.request.data or job.request.calibrate)
            if job.request.data is None:
                self.facts["measured on"] += ", kept apart from what fits"
        if held is not None and held.objective is not None:
            self.facts["objective"] = held.objective.name
        self.facts["machine"] = f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        after = self.steps[-1].quality if self.steps else self.before
        return Outcome(
            Size(
                job.source.name,
                parameters_of(job.source.model),
                weight_bytes(job.source.directory),
                self.before,
                speed.get("source"),
            ),
            Size(name, parameters_of(self.model), weight_bytes(folder), after, speed.get("result")),
            self.steps,
            reload,
            self.model.architecture.family if saved.stock else None,
            saved.reasons,
            self.facts,
            dict(job.request.changes),
            self.curves,
            _card_of(job.source.directory),
            None if Path(job.source.name).expanduser().exists() else job.source.name,
        )

    def _reloaded(self, folder: Path, saved: Saved, reloaded: Transformer) -> Reload:
        ids = sample_ids(self.model, self._held(self.model, self.tokenizer), self.job.request.seed)
        both = _is_two_sided(self.model)
        ours = logits_of(self.model, ids, both=both)
        largest = float((ours - logits_of(reloaded, ids, both=both)).abs().max())
        found = Reload(largest, ids.numel())
        if not saved.stock:
            return dataclasses.replace(found, note="Lathe's own form, which stock transformers cannot open")
        if self.job.request.stream:
            return dataclasses.replace(found, note="not opened by stock transformers, which would hold the whole model")
        if importlib.util.find_spec("transformers") is None:
            return dataclasses.replace(found, note="transformers is not installed here")
        return _opened_by_stock(folder, found, ours, ids, both)

    # --- text and measurements

    def _measure(
        self, model: Transformer, tokenizer: Tokenizer | None, steps: Sequence[Step], *, heals: bool = False
    ) -> None:
        """Note an operation's steps; what it cost as a whole stands at its last one."""
        renumbers = tokenizer is not self.tokenizer
        if renumbers:
            self._ids = sample_ids(model, self._held(model, tokenizer), self.job.request.seed)
        logits = self._sampled(model)
        moved = None if renumbers else change(self._logits, logits)
        self._logits, self.tokenizer = logits, tokenizer
        found, parameters = self._quality(model, tokenizer), parameters_of(model)
        *first, last = steps
        for each in first:
            self.steps.append(Done(each.name, each.exact, each.detail, None, None, parameters, each.measures))
        self.steps.append(
            Done(last.name, last.exact, last.detail, moved, found, parameters, last.measures, heals, renumbers)
        )
        loss = "" if found is None else f": loss {found.loss:.4f}"
        self.reporter.say("; ".join(step.name for step in steps) + loss)

    def _sampled(self, model: Transformer) -> Tensor:
        return logits_of(model, self._ids, both=_is_two_sided(model))

    def _quality(self, model: Transformer, tokenizer: Tokenizer | None) -> Quality | None:
        held = self._held(model, tokenizer)
        return None if held is None else quality(model, held)

    def _held(self, model: Transformer, tokenizer: Tokenizer | None) -> Text | None:
        """The text that is measured on, as this model is shown it."""
        settings = self.job.request.data or self.job.request.calibrate
        return self._laid(self.job.held, settings, model, tokenizer)

    def _laid(
        self,
        documents: Documents | None,
        settings: TextSettings | None,
        model: Transformer,
        tokenizer: Tokenizer | None,
    ) -> Text | None:
        if documents is None or settings is None or tokenizer is None:
            return None
        return lay(documents, settings, model.architecture, tokenizer, self.job.request.objective)

    def _timed(self, model: Transformer, tokenizer: Tokenizer | None) -> Sequence[Batch]:
        held = self._held(model, tokenizer)
        if held is not None:
            return held.batches
        ids = sample_ids(model, None, self.job.request.seed).repeat(4, 1)
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if _is_two_sided(model) else {})}
        return [Batch(inputs, ids.numel() * (2 if _is_two_sided(model) else 1), 0, "drawn ids")]

    def _healing_text(self, settings: HealSettings) -> Documents:
        """What is healed on: nothing of what was kept apart to measure on."""
        assert self.job.source.tokenizer is not None
        documents, _ = read_documents(settings.text, self.job.source.tokenizer, apart=False)
        if not self.job.is_apart or self.job.held is None:
            return documents
        apart = set(self.job.held.texts)
        return Documents.of(text for text in documents.texts if text not in apart)

    def _fitted_digest(self) -> str | None:
        return None if self.job.fitted is None else self.job.fitted.digest


def _made(done: Resized) -> Transformer:
    """The model that a resize ended with."""
    if isinstance(done.tensors, Tensors):
        return StreamedTransformer(done.architecture, done.tensors)
    model = Transformer(done.architecture, device="meta")
    model.load_state_dict(dict(done.tensors), assign=True)
    return model.requires_grad_(True).eval()


def _shard_bytes(source: Path) -> int:
    """The result's shards are no larger than the source's: whoever had room for those has room for these."""
    files = find_weights(source).files
    return max(file.stat().st_size for file in files) if len(files) > 1 else DEFAULT_SHARD_BYTES


# What of a source's model card is true of a model made from it.
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "widget")


def _card_of(directory: Path) -> dict[str, Any]:
    """Licence, language and the like, from the header of the source's README.md; nothing where it has none."""
    file = directory / "README.md"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return {}
    try:
        header = yaml.safe_load(text[4 : text.index("\n---", 3)])
    except yaml.YAMLError as error:
        log.warning("the header of %s is not YAML (%s): its licence is not carried over", file, type(error).__name__)
        return {}
    return {key: header[key] for key in _KEPT if key in header} if isinstance(header, dict) else {}


def _is_two_sided(model: Transformer) -> bool:
    return model.encoder is not None and model.decoder is not None


def _described(text: Text, settings: TextSettings | None) -> str:
    assert settings is not None
    return f"{settings.file}: {len(text.documents.texts):,} documents, {text.tokens:,} tokens"


def _spent(run: Path) -> tuple[int, int]:
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return int(last["step"]), int(last["tokens"])


def _curve_of(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(int(each["step"]), float(each["loss"])) for each in map(json.loads, lines)]


def _opened_by_stock(folder: Path, found: Reload, ours: Tensor, ids: Tensor, both: bool) -> Reload:
    """The same logits from stock `transformers`, and what it says about the tensors."""
    import transformers
    from transformers.utils import logging as their_logging

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kind = getattr(transformers, config["architectures"][0])
    level = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    bars = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        stock, info = kind.from_pretrained(folder, output_loading_info=True)
    finally:
        their_logging.set_verbosity(level)
        if bars:
            their_logging.enable_progress_bar()
    theirs = logits_of(stock.eval().to(torch.get_default_dtype()), ids, both=both)
    return dataclasses.replace(
        found,
        stock=float((ours - theirs).abs().max()),
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
    )
