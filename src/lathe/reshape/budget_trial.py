"""Trials: a model cut to some sizes for real, refit and all, and its loss on held-out text.

The loss has to be comparable between vocabularies. A smaller one spells the same text with more tokens, each easier to
guess, so nats a token fall while nothing got better. So the loss is counted for each token of the *source's* tokenizer:
nats a token, times the tokens of the text, over the tokens that the source makes of it. A word that can no longer be
read (it has become the unknown token, which is easy to guess) counts as a guess among all of the source's tokens, as
often as the source had tokens for it. Where the vocabulary stays, this is the loss as everywhere else. Of pairs it is
the targets that count, as they are what is predicted: a source that can be read less well makes them harder to guess.

For a masked model that is a measure between vocabularies, not a likelihood: a hidden piece is guessed with the rest of
its word in sight, which flatters small pieces, and other pieces are hidden. So a smaller vocabulary never counts as a
gain: the loss is at least that of the same cut with the vocabulary as it was.

Without text, from batches of token ids alone, a cut is measured by how far its predictions are from the source's: the
mean Kullback-Leibler divergence in nats a token.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.model.loss import IGNORED
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.measure import quality
from lathe.reshape.resize import resize
from lathe.reshape.state import Step
from lathe.reshape.text import Documents, Record, TextSettings, lay
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger("lathe")

Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """Sizes that were tried.

    Args:
        loss: on the held-out text, nats for each token of the source; None where it could not be done.
        why: why it could not be done.
    """

    sizes: Mapping[str, Any]
    architecture: Architecture
    loss: float | None
    why: str = ""


class Probe(Protocol):
    """Text to fit a cut on, and text to measure it on."""

    described: str  # where the losses come from
    reads_text: bool  # whether it can show the text to another tokenizer

    def batches(self, *, whole: bool) -> Sequence[Batch]:
        """What a cut is fitted on; all of it, or as much as a trial gets."""
        ...

    def is_whole(self) -> bool:
        """Whether a trial gets all of it."""
        ...

    def loss(self, model: Transformer, tokenizer: Tokenizer | None) -> float:
        """How well a model does on the held-out text; lower is better."""
        ...


class TextProbe:
    """Documents, shown to each model as it and its tokenizer ask.

    Args:
        fitted, held: what is fitted on, and what is measured on.
        fit_settings, held_settings: how they are laid into rows.
        tokens: how many tokens of `fitted` a trial gets.

    Raises:
        RequestError: a model that predicts no tokens.
    """

    reads_text = True

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        fitted: Documents,
        held: Documents,
        fit_settings: TextSettings,
        held_settings: TextSettings,
        *,
        tokens: int,
        objective: Mapping[str, Any] | None = None,
    ) -> None:
        self._architecture, self._tokenizer, self._objective = model.architecture, tokenizer, objective
        self._held, self._held_settings = held, held_settings
        self._part = _beginning(fitted, tokenizer, tokens)
        self._whole, self._fit_settings = fitted, fit_settings
        self._laid: dict[bool, Sequence[Batch]] = {}
        self._predicted = list(held.texts if held.targets is None else held.targets)
        self._tokens = _count(tokenizer, self._predicted)
        self._words = Counter(word for text in self._predicted for word in text.split())
        self._spelt = _spelt(tokenizer, list(self._words))
        laid = lay(held, held_settings, model.architecture, tokenizer, objective)
        if laid.objective is None:
            raise RequestError(
                "a budget is planned by the loss on text, and this model predicts no tokens: give sizes, as in d_ff=512"
            )
        self.described = f"{laid.objective.name} loss on {self._tokens:,} tokens of {held_settings.file}"

    def is_whole(self) -> bool:
        """Whether a trial gets all of the text."""
        return len(self._part.texts) == len(self._whole.texts)

    def batches(self, *, whole: bool) -> Sequence[Batch]:
        """What a cut is fitted on."""
        if whole not in self._laid:
            documents = self._whole if whole else self._part
            laid = lay(documents, self._fit_settings, self._architecture, self._tokenizer, self._objective)
            self._laid[whole] = laid.inputs
        return self._laid[whole]

    def loss(self, model: Transformer, tokenizer: Tokenizer | None) -> float:
        """Nats for each token of the source's tokenizer."""
        assert tokenizer is not None
        found = quality(model, lay(self._held, self._held_settings, model.architecture, tokenizer, self._objective))
        assert found is not None
        if tokenizer is self._tokenizer:
            return found.loss
        tokens = _count(tokenizer, self._predicted)
        guess = math.log(self._architecture.embedding.vocab_size)
        lost = 0.0
        spelt_now = _spelt(tokenizer, list(self._words))
        for times, (old, unknown), (new, unknown_now) in zip(self._words.values(), self._spelt, spelt_now, strict=True):
            if unknown_now > unknown:
                tokens -= times * new
                lost += times * old * guess
        return (found.loss * tokens + lost) / self._tokens


def _count(tokenizer: Tokenizer, texts: list[str]) -> int:
    """How many tokens some texts are."""
    return sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))


def _spelt(tokenizer: Tokenizer, words: list[str]) -> list[tuple[int, int]]:
    """For each word its tokens, and how many of them are unknown."""
    encoded = tokenizer.encode_batch(words, add_special_tokens=False)
    return [(len(ids), sum(number == tokenizer.unk_id for number in ids)) for ids in encoded]


def _beginning(documents: Documents, tokenizer: Tokenizer, tokens: int) -> Documents:
    """The first documents, until there are enough tokens."""
    used: list[Record] = []
    total = 0
    sides = [tokenizer.encode_batch(list(side), add_special_tokens=False) for side in zip(*documents.records)]
    for record, *encoded in zip(documents.records, *sides, strict=True):
        if total >= tokens:
            break
        used.append(record)
        total += sum(map(len, encoded))
    return Documents.of_records(used, pairs=documents.targets is not None)


class RowsProbe:
    """Batches of token ids: the last tenth of the rows is kept apart, and predictions are compared with the source's.

    Raises:
        RequestError: fewer than two rows, or a model without a head.
    """

    reads_text = False

    def __init__(self, model: Transformer, batches: Sequence[Batch]) -> None:
        self._fitted, self._held = _apart([dict(batch) for batch in batches])
        head = model.architecture.head
        if head.language is None and head.classifier is None:
            raise RequestError(
                "a budget is planned by what the model predicts, and this one has no head: give sizes, as in d_ff=512"
            )
        with torch.no_grad():
            self._wanted = [_predicted(model, batch) for batch in self._held]
        rows = sum(len(each) for each in self._wanted)
        self.described = f"divergence from the source's predictions at {rows:,} positions"

    def is_whole(self) -> bool:
        """A trial gets all of the rows."""
        return True

    def batches(self, *, whole: bool) -> Sequence[Batch]:
        """What a cut is fitted on."""
        return self._fitted

    def loss(self, model: Transformer, tokenizer: Tokenizer | None) -> float:
        """Nats a token."""
        total, rows = 0.0, 0
        with torch.no_grad():
            for batch, wanted_NV in zip(self._held, self._wanted, strict=True):
                found_NV = _predicted(model, batch)
                total += float((wanted_NV.exp() * (wanted_NV - found_NV)).sum())
                rows += len(wanted_NV)
        return total / rows


def _predicted(model: Transformer, batch: Batch) -> Tensor:
    """Log-probabilities at every token, N × V; pads are left out."""
    training = model.training
    output = model.eval()(**batch)
    model.train(training)
    assert output.logits is not None
    logits = output.logits.flatten(0, -2).float()
    labels = batch.get("labels")
    if model.decoder is None or model.encoder is None:
        mask = batch.get("attention_mask")
    elif labels is not None and "decoder_input_ids" not in batch:  # what the decoder reads is made from them
        mask = labels != IGNORED
    else:
        mask = batch.get("decoder_attention_mask")
    if mask is not None and mask.numel() == len(logits):
        logits = logits[mask.flatten().bool()]
    found: Tensor = logits.log_softmax(-1)
    return found


def _apart(batches: list[dict[str, Tensor]]) -> tuple[list[Batch], list[Batch]]:
    """The batches, and about a tenth of their rows apart from them."""
    total = sum(len(batch["input_ids"]) for batch in batches if "input_ids" in batch)
    if total < 2:
        raise RequestError(f"a budget needs rows to fit on and rows to measure on, and {total} were given; give 20")
    wanted = max(1, total // 10)
    fitted: list[Batch] = []
    held: list[Batch] = []
    for batch in reversed(batches):
        rows = len(batch["input_ids"])
        take = min(wanted, rows)
        wanted -= take
        for part, chosen in ((held, slice(rows - take, rows)), (fitted, slice(0, rows - take))):
            if chosen.stop > chosen.start:
                part.append({key: value[chosen] for key, value in batch.items()})
    return fitted[::-1], held[::-1]


class Trials:
    """Trials of one model, none made twice.

    Args:
        fixed: fields that are set in any case.
        how: the method and what else `resize` takes by name.
        reserved: token ids that stay in any case.
        say: told a line about each trial.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        probe: Probe,
        *,
        fixed: Sizes,
        how: Mapping[str, Any],
        seed: int,
        own_form: bool,
        reserved: frozenset[int] = frozenset(),
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.say = say
        self.model, self.probe, self.fixed = model, probe, dict(fixed)
        self._tokenizer, self._how, self._seed = tokenizer, dict(how), seed
        self._own_form, self._reserved = own_form, reserved
        self._made: dict[tuple[str, bool], Trial] = {}

    @property
    def count(self) -> int:
        """How many cuts were made and measured."""
        return len(self._made)

    def made(self) -> list[Trial]:
        """Every trial, in order; one that was made again on all of the text stands there twice."""
        return list(self._made.values())

    def of(self, sizes: Sizes, architecture: Architecture, *, whole: bool = False) -> Trial:
        """The model with these sizes, measured.

        Args:
            architecture: what they lead to.
            whole: fit on all of the text.
        """
        whole = whole or self.probe.is_whole()
        key = (repr(sorted(sizes.items())), whole)
        if key not in self._made:
            self._made[key] = self._try(sizes, architecture, whole)
            self.say(f"trial {self.count}: {told(self._made[key])}")
        return self._made[key]

    def _try(self, sizes: Sizes, architecture: Architecture, whole: bool) -> Trial:
        changes = {**self.fixed, **sizes}
        if not changes:
            return Trial({}, architecture, self.probe.loss(self.model, self._tokenizer))
        kept: list[Transformer] = [self.model]  # as it was before the vocabulary changed

        def after(model: Transformer, tokenizer: Tokenizer | None, _: Sequence[Step]) -> None:
            if tokenizer is self._tokenizer:
                kept[0] = model

        try:
            done = resize(
                self.model,
                changes,
                calibrate=self.probe.batches(whole=whole),
                **self._how,
                seed=self._seed,
                tokenizer=self._tokenizer,
                own_form=self._own_form,
                reserved=self._reserved,
                after=after,
            )
        except RequestError as error:  # what only the work itself finds out; the plan shows it
            return Trial(dict(sizes), architecture, None, str(error))
        loss = self.probe.loss(done.model(), done.tokenizer)
        if done.tokenizer is not self._tokenizer:
            loss = max(loss, self.probe.loss(kept[0], self._tokenizer))
        if not math.isfinite(loss):
            return Trial(dict(sizes), done.architecture, None, f"the loss is {loss}")
        return Trial(dict(sizes), done.architecture, loss)


def told(trial: Trial) -> str:
    """A trial in one line."""
    sizes = ", ".join(f"{name}={size}" for name, size in trial.sizes.items()) or "as it is"
    return f"{sizes}: loss {trial.loss:.4f}" if trial.loss is not None else f"{sizes}: cannot be done ({trial.why})"
