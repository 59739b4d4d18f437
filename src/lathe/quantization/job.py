"""`lathe quantize` as a function: open, choose codes, measure, write, open again.

What is measured is what a user would otherwise ask for by hand: the loss before and after on text that the codes were
not chosen on, how far each layer's output is off, and what leaving one of the worst layers alone would win. The files
are then opened as a user would open them, by Lathe and, where it and `compressed-tensors` are installed, by stock
`transformers`, and their logits compared.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lathe.blueprint import stored
from lathe.checkpoint.atomic import atomic_directory
from lathe.checkpoint.compressed import KEY
from lathe.checkpoint.load import OWN, Checkpoint, open_checkpoint
from lathe.checkpoint.save import Saved, write_checkpoint
from lathe.errors import RequestError
from lathe.model.codes import Codes
from lathe.model.transformer import Transformer
from lathe.quantization.outcome import Layer, Outcome, Proposal
from lathe.quantization.place import fill
from lathe.quantization.quantise import Chosen, quantise
from lathe.quantization.settings import QuantizeSettings, candidates, choose_targets
from lathe.reshape.carry_out import _card_of
from lathe.reshape.history import described, opened_by_stock
from lathe.reshape.job import Reporter, Silent
from lathe.reshape.measure import (
    Quality,
    change,
    is_two_sided,
    logits_of,
    parameters_of,
    quality,
    sample_ids,
    weight_bytes,
)
from lathe.reshape.outcome import Reload, Size
from lathe.reshape.recipe import Recipe, machine, source_digest, weight_digests, written
from lathe.reshape.text import Documents, Text, TextSettings, lay, read_documents
from lathe.spec import Spec, size
from lathe.text.tokenizer import Tokenizer

Pages = Callable[[Outcome, Recipe], Mapping[str, str]]

_TRIED = 6  # of the worst layers, each left alone in turn
_TRIED_BATCHES = 8
_WORTH = 0.05  # of the loss that quantising cost


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(Spec):
    """What a quantisation is asked.

    Args:
        calibrate: text that the codes are chosen on.
        data: text to measure on; else a tenth of `calibrate` is kept apart for it.
        objective: what the model predicts: its name and settings; what its head says where left out.
    """

    source: str
    settings: QuantizeSettings
    calibrate: TextSettings | None = None
    data: TextSettings | None = None
    objective: dict = field(default_factory=dict)  # type: ignore[type-arg]
    seed: int = size(2**32 - 1, least=0, default=0)


class Job:
    """A request with everything that it names opened and checked.

    Raises:
        RequestError: no such model, a quantised one, a layer to keep that is not there, or text that cannot be read.
    """

    def __init__(self, request: QuantizeRequest) -> None:
        self.request = request
        checkpoint = open_checkpoint(request.source)
        assert checkpoint.directory is not None
        self.checkpoint, self.directory = checkpoint, checkpoint.directory
        self.settings = request.settings.settled(has_text=request.calibrate is not None)
        self.targets = choose_targets(checkpoint.architecture, self.settings)
        self.tokenizer = Tokenizer.load(self.directory) if Tokenizer.is_in(self.directory) else None
        fitted, held = self._documents()
        self.fitted, self.text = self._laid(fitted, request.calibrate), self._laid(held, request.data)
        if self.text is None and held is not None:
            self.text = self._laid(held, request.calibrate)
        self.model = _model(checkpoint, codes={})

    def _documents(self) -> tuple[Documents | None, Documents | None]:
        request, fitted, held = self.request, None, None
        if request.calibrate is None and request.data is None:
            return None, None
        if self.tokenizer is None:
            raise RequestError(f"{request.source} holds no tokenizer to read text with; put its tokenizer beside it")
        if request.calibrate is not None:
            # Nothing is kept apart to measure a loss on where the model has none on text.
            predicts = self.checkpoint.architecture.head.language is not None
            apart = request.data is None and predicts
            fitted, held = read_documents(request.calibrate, self.tokenizer, apart=apart)
        if request.data is not None:
            held, _ = read_documents(request.data, self.tokenizer, apart=False)
        return fitted, held or None

    def _laid(self, documents: Documents | None, settings: TextSettings | None) -> Text | None:
        if documents is None or settings is None or self.tokenizer is None:
            return None
        if not documents:
            raise RequestError(f"{settings.file} has no token that {self.request.source}'s tokenizer can read")
        return lay(documents, settings, self.checkpoint.architecture, self.tokenizer, self.request.objective)

    def run(self, destination: Path, *, pages: Pages, reporter: Reporter | None = None) -> Outcome:
        """Do it, and write the result.

        Args:
            destination: must not exist, or be empty.
            pages: makes the text files that describe the result, name to content.

        Raises:
            RequestError: `destination` exists, or text that is too short.
            LatheError: the disk is full; nothing is left at `destination`.
        """
        reporter, started = reporter or Silent(), time.perf_counter()
        with atomic_directory(destination, nbytes=self._nbytes()) as folder:
            with reporter.work("quantise", len(self.targets)) as advance:
                chosen = quantise(
                    self.model,
                    self.settings,
                    [] if self.fitted is None else self.fitted.inputs,
                    advance=advance,
                )
            outcome, recipe = self._finish(folder, destination.name, chosen)
            outcome.seconds = time.perf_counter() - started
            for name, text in pages(outcome, recipe).items():
                (folder / name).write_text(text, encoding="utf-8")
        return outcome

    def _nbytes(self) -> int:
        """About how much will be written."""
        bits = {target.name: target.bits for target in self.targets}
        whole = 8 * self.model.dtype.itemsize
        return sum(p.size * bits.get(p.name, whole) for p in stored(self.model.architecture)) // 8

    def _finish(self, folder: Path, name: str, chosen: Chosen) -> tuple[Outcome, Recipe]:
        made = _model(self.checkpoint, codes=chosen.codes)
        ids = sample_ids(self.model, self.text, self.request.seed)
        both = is_two_sided(self.model)
        ours = logits_of(made, ids, both=both)
        before = after = None
        if self.text is not None:
            before, after = quality(self.model, self.text), quality(made, self.text)
        saved = write_checkpoint(
            folder,
            self.model.architecture,
            _tensors(self.checkpoint, chosen.codes),
            tokenizer=self.tokenizer,
            generation=self.checkpoint.generation,
            config=self.checkpoint.config,
            codes=chosen.codes,
        )
        recipe = self._recipe(chosen)
        _write_recipe(folder, recipe, saved)
        parameters = parameters_of(self.model)
        done = Outcome(
            source=Size(self.request.source, parameters, weight_bytes(self.directory), before),
            result=Size(name, parameters, weight_bytes(folder), after),
            settings=chosen.settings.to_dict(),
            layers=self._layers(chosen),
            kept=self._kept(chosen.codes),
            change=change(logits_of(self.model, ids, both=both), ours),
            proposals=self._proposals(chosen, before, after),
            reload=_reloaded(folder, saved, ours, ids, both),
            family=self.model.architecture.family if saved.stock else None,
            reasons=saved.reasons,
            facts=self._facts(),
            card=_card_of(self.directory),
            base=None if Path(self.request.source).expanduser().exists() else self.request.source,
            data=None if self.request.data is None else self.request.data.to_dict(),
        )
        return done, recipe

    def _layers(self, chosen: Chosen) -> list[Layer]:
        itemsize = self.model.dtype.itemsize
        rows = [
            Layer(
                target.layer,
                target.bits,
                chosen.codes[target.name].group_size,
                target.activations,
                chosen.errors[target.layer],
                chosen.codes[target.name].codes_OI.numel() * itemsize,
                chosen.codes[target.name].nbytes,
            )
            for target in self.targets
        ]
        return sorted(rows, key=lambda row: -row.error)

    def _kept(self, codes: Mapping[str, Codes]) -> list[str]:
        return [p.name.removesuffix(".weight") for p in candidates(self.model.architecture) if p.name not in codes]

    def _proposals(self, chosen: Chosen, before: Quality | None, after: Quality | None) -> list[Proposal]:
        """What each of the worst layers is worth if it alone is left as it was, where that was measured."""
        if self.text is None or before is None or after is None or after.loss <= before.loss:
            return []
        few = replace(self.text, batches=self.text.batches[:_TRIED_BATCHES])
        worst = self._layers(chosen)[:_TRIED]
        whole = quality(_model(self.checkpoint, codes=chosen.codes), few)
        least = _WORTH * (after.loss - before.loss)
        found: list[Proposal] = []
        for layer in worst:
            rest = {name: codes for name, codes in chosen.codes.items() if name != f"{layer.name}.weight"}
            tried = quality(_model(self.checkpoint, codes=rest), few)
            assert tried is not None
            assert whole is not None
            gain = whole.loss - tried.loss
            if gain > least:
                found.append(Proposal(layer.name, gain, layer.bytes_before - layer.bytes_after))
        return sorted(found, key=lambda each: -each.gain)

    def _recipe(self, chosen: Chosen) -> Recipe:
        calibrate = None
        if self.request.calibrate is not None and self.fitted is not None:
            calibrate = {**self.request.calibrate.to_dict(), "sha256": self.fitted.documents.digest}
        return Recipe(
            source={"model": self.request.source, "sha256": source_digest(self.directory)},
            stages=[{"quantize": chosen.settings.to_dict()}],
            seed=self.request.seed,
            objective=self.request.objective,
            calibrate=calibrate,
            made_with=machine(),
        )

    def _facts(self) -> dict[str, str]:
        facts: dict[str, str] = {}
        request = self.request
        if self.fitted is not None and request.calibrate is not None:
            facts["codes chosen on"] = described(self.fitted, request.calibrate)
        measured = request.data or request.calibrate
        if measured is not None and self.checkpoint.architecture.head.language is None:
            facts["loss"] = "not measured: this model predicts no tokens; lathe evaluate measures a classifier"
        elif self.text is not None and measured is not None:
            apart = "" if request.data is not None else ", kept apart from what the codes were chosen on"
            facts["measured on"] = described(self.text, measured) + apart
            if self.text.objective is not None:
                facts["objective"] = self.text.objective.name
        return facts


def _model(checkpoint: Checkpoint, *, codes: Mapping[str, Codes]) -> Transformer:
    """The checkpoint's model with some of its matrices in codes; what is not copied is shared with the file."""
    model = Transformer(checkpoint.architecture, device="meta")
    fill(model, _tensors(checkpoint, codes), codes)
    return model.eval()


def _tensors(checkpoint: Checkpoint, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are in no codes."""
    parameters = checkpoint.parameters
    return {name: parameters.tensor(name) for name in parameters.names() if name not in codes}


def _write_recipe(folder: Path, recipe: Recipe, saved: Saved) -> None:
    beside: Mapping[str, Any] = {}
    if not saved.stock:
        described = json.loads((folder / OWN).read_text(encoding="utf-8"))
        beside = {key: described[key] for key in ("architecture", KEY)}
    (folder / OWN).write_text(written(recipe, weight_digests(folder), beside), encoding="utf-8")


def _reloaded(folder: Path, saved: Saved, ours: Tensor, ids: Tensor, both: bool) -> Reload:
    opened = open_checkpoint(folder, quantized=True)
    again = logits_of(_model(opened, codes=opened.codes), ids, both=both)
    found = Reload(float((ours - again).abs().max()), ids.numel())
    if not saved.stock:
        return replace(found, note="Lathe's own form, which stock transformers cannot open")
    missing: Sequence[str] = [
        name for name in ("transformers", "compressed_tensors") if importlib.util.find_spec(name) is None
    ]
    if missing:
        return replace(found, note=f"{missing[0].replace('_', '-')} is not installed here")
    return opened_by_stock(folder, found, ours, ids, both)
