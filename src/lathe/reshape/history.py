"""How a model was made from another, as far as it has come: what its recipe, its page and its card are written from.

It holds numbers and the text that is measured on, and no weights, so it can travel with a model as long as that
lives. `write` puts a model and its history into a directory: the checkpoint and `lathe.json`. Once the files have been
opened again and compared, there is an `Outcome`, from which pages are drawn.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.adapt.adapters import folded_tensors
from lathe.adapt.files import WEIGHTS as ADAPTER_WEIGHTS
from lathe.adapt.files import save_adapter
from lathe.checkpoint.digest import digest_file
from lathe.checkpoint.load import CONFIG, OWN
from lathe.checkpoint.save import DEFAULT_SHARD_BYTES, Saved, write_checkpoint
from lathe.model.transformer import Transformer
from lathe.reshape.measure import change, is_two_sided, logits_of, parameters_of, quality, sample_ids, weight_bytes
from lathe.reshape.outcome import Done, Outcome, Reload, Size
from lathe.reshape.recipe import Recipe, digest_of, weight_digests, written
from lathe.reshape.share_remainder import REMAINDER
from lathe.reshape.state import Step
from lathe.reshape.stream import StreamedTransformer, weights_of
from lathe.reshape.text import Documents, Text, TextSettings, lay
from lathe.text.tokenizer import Tokenizer
from lathe.text.use import unknown_share

UNKNOWN = "read as unknown"  # the fact that says how much of the text the result cannot read


@dataclass(frozen=True)
class Reading:
    """The text that a model is measured on, and how it is shown to it.

    Args:
        documents: None where there is no text; then nothing but the logits of drawn ids is looked at.
        apart: what was kept apart of the text that the cut was fitted on, which nothing may be healed on.
    """

    documents: Documents | None
    settings: TextSettings | None
    objective: Mapping[str, Any]
    seed: int
    apart: Documents | None = None

    def laid(self, model: Transformer, tokenizer: Tokenizer | None) -> Text | None:
        """The text as this model is shown it."""
        if self.documents is None or self.settings is None or tokenizer is None:
            return None
        return lay(self.documents, self.settings, model.architecture, tokenizer, self.objective)

    def ids(self, model: Transformer, tokenizer: Tokenizer | None) -> Tensor:
        """A few rows of it, on which logits are compared."""
        return sample_ids(model, self.laid(model, tokenizer), self.seed)

    def facts(self, model: Transformer, tokenizer: Tokenizer | None) -> dict[str, str]:
        """What was measured on, in words."""
        held = self.laid(model, tokenizer)
        if held is None or self.settings is None or tokenizer is None:
            return {}
        told = described(held, self.settings) + (", kept apart from what fits" if self.documents is self.apart else "")
        facts = {"measured on": told} | ({} if held.objective is None else {"objective": held.objective.name})
        unknown = unknown_share(tokenizer, chain(held.documents.texts, held.documents.targets or ()))
        if unknown:
            facts[UNKNOWN] = f"{unknown:.1%} of that text's pieces, which are easily guessed"
        return facts


@dataclass
class History:
    """See the module.

    Args:
        source: the model that all began with.
        changes: the fields that were changed, all stages together.
        card: what the source's own model card says of licence, language and data.
        base: the source's hub id; None where it is a directory or was in memory.
        recipe: with the stages so far.
        facts: where the numbers come from: names and values.
        curves: loss of each healing's steps.
        weights: the SHA-256 of the weights after the last stage, to tell whether somebody changed them since; None
            where nobody could.
    """

    source: Size
    changes: dict[str, Any]
    card: dict[str, Any]
    base: str | None
    recipe: Recipe
    reading: Reading
    steps: list[Done] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    weights: str | None = None

    def note(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        steps: list[Step],
        before: Tensor | None,
        *,
        heals: bool = False,
        parameters: int | None = None,
    ) -> Tensor:
        """Write down what was done: what it cost as a whole stands at the last of its steps.

        Args:
            model: after the steps.
            before: the logits of `Reading.ids` before them; None where the ids meant something else then.
            parameters: of the model, where they are not all in it.

        Returns:
            The logits after them.
        """
        logits = logits_of(model, self.reading.ids(model, tokenizer), both=is_two_sided(model))
        held = self.reading.laid(model, tokenizer)
        found = None if held is None else quality(model, held)
        size = parameters_of(model) if parameters is None else parameters
        *first, last = steps
        exact = all(each.exact for each in steps)  # what is measured is all of them
        for each in first:
            self.steps.append(Done(each.name, each.exact, each.detail, None, None, size, each.measures, note=each.note))
        moved = None if before is None else change(before, logits)
        self.steps.append(
            Done(
                last.name,
                exact,
                last.detail,
                moved,
                found,
                size,
                last.measures,
                heals=heals,
                renumbers=before is None,
                note=last.note,
            )
        )
        return logits

    def was_changed(self, model: Transformer) -> bool:
        """Whether the weights are others than after the last stage."""
        return self.weights is not None and self.weights != digest_of(folded_tensors(model))

    def with_unknown(self, model: Transformer, tokenizer: Tokenizer | None) -> History:
        """The history of a model that was changed by somebody else since: trained, most likely."""
        made = dataclasses.replace(
            self,
            recipe=dataclasses.replace(self.recipe, obstacle="the weights were changed after its last stage"),
            steps=list(self.steps),
            weights=digest_of(folded_tensors(model)),
        )
        ids = self.reading.ids(model, tokenizer)
        step = Step("changed since, outside of Lathe's operations", False, {})
        made.note(model, tokenizer, [step], logits_of(model, ids, both=is_two_sided(model)))
        made.steps[-1] = dataclasses.replace(made.steps[-1], change=None, heals=True)
        return made


def described(text: Text, settings: TextSettings) -> str:
    """How much of which file."""
    return f"{settings.file}: {len(text.documents.texts):,} documents, {text.tokens:,} tokens"


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A model that is to be written, with what travels with it.

    Args:
        relaxed: the model with each shared layer's remainder as an adapter, where those are kept.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    generation: Mapping[str, Any]
    config: Mapping[str, Any]
    relaxed: Transformer | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The weights that are written; an active adapter is folded in."""
        if isinstance(self.model, StreamedTransformer):
            return weights_of(self.model)
        return folded_tensors(self.model)


def write(
    made: Made, history: History, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> tuple[Saved, dict[str, str]]:
    """Put the model and its recipe into a directory that is there and empty.

    Returns:
        What was saved, and the SHA-256 of each file of weights.
    """
    saved = write_checkpoint(
        folder,
        made.model.architecture,
        made.tensors,
        tokenizer=made.tokenizer,
        generation=made.generation,
        config=made.config,
        max_shard_bytes=max_shard_bytes,
    )
    digests = weight_digests(folder)
    if made.relaxed is not None:
        save_adapter(made.relaxed, folder / REMAINDER, name=REMAINDER)
        digests[f"{REMAINDER}/{ADAPTER_WEIGHTS}"] = digest_file(folder / REMAINDER / ADAPTER_WEIGHTS)
    beside = {} if saved.stock else {"architecture": made.model.architecture.to_dict()}
    (folder / OWN).write_text(written(history.recipe, digests, beside), encoding="utf-8")
    return saved, digests


def outcome_of(
    made: Made,
    history: History,
    folder: Path,
    saved: Saved,
    name: str,
    reloaded: Transformer,
    *,
    speed: Mapping[str, float] | None = None,
    streamed: bool = False,
) -> Outcome:
    """What was done, with the files as they were opened again.

    Args:
        name: what the result is called.
        reloaded: the model as it was read from `folder`, adapter and all.
        speed: tokens a second of `source` and `result`.
        streamed: stock `transformers` would hold the whole model: it is not asked.
    """
    speed = speed or {}
    shown = made.relaxed or made.model
    ids = history.reading.ids(shown, made.tokenizer)
    after = history.steps[-1].quality if history.steps else history.source.quality
    parameters = history.steps[-1].parameters if history.steps else parameters_of(made.model)
    nbytes = weight_bytes(folder)
    if made.relaxed is not None:
        nbytes += (folder / REMAINDER / ADAPTER_WEIGHTS).stat().st_size
    return Outcome(
        dataclasses.replace(history.source, tokens_per_second=speed.get("source")),
        Size(name, parameters, nbytes, after, speed.get("result")),
        history.steps,
        _reloaded(folder, saved, made, shown, reloaded, ids, streamed),
        made.model.architecture.family if saved.stock else None,
        saved.reasons,
        history.facts,
        history.changes,
        history.curves,
        history.card,
        history.base,
    )


def _reloaded(
    folder: Path, saved: Saved, made: Made, shown: Transformer, reloaded: Transformer, ids: Tensor, streamed: bool
) -> Reload:
    both = is_two_sided(shown)
    ours = logits_of(shown, ids, both=both)
    found = Reload(float((ours - logits_of(reloaded, ids, both=both)).abs().max()), ids.numel())
    if made.relaxed is not None:
        return dataclasses.replace(
            found, note=f"{REMAINDER}/ goes on the model with sharing=none, as peft or lathe.load opens it"
        )
    if not saved.stock:
        return dataclasses.replace(found, note="Lathe's own form, which stock transformers cannot open")
    if streamed:
        return dataclasses.replace(found, note="not opened by stock transformers, which would hold the whole model")
    if importlib.util.find_spec("transformers") is None:
        return dataclasses.replace(found, note="transformers is not installed here")
    if reloaded.dtype != torch.get_default_dtype():  # in 16 bits the two round differently: compare the weights alone
        ours = logits_of(copy.deepcopy(reloaded).to(torch.get_default_dtype()), ids, both=both)
    return opened_by_stock(folder, found, ours, ids, both)


def opened_by_stock(folder: Path, found: Reload, ours: Tensor, ids: Tensor, both: bool) -> Reload:
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
    stock = stock.eval().to(torch.get_default_dtype())
    # Row by row: a stock classifier refuses rows with unlike numbers of end marks, or several where nothing pads.
    theirs = torch.cat([logits_of(stock, row[None], both=both) for row in ids])
    return dataclasses.replace(
        found,
        stock=float((ours - theirs).abs().max()),
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
    )
