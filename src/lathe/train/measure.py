"""How good a model is on text that it has not seen.

- `loss`: nats for each label that is asked; `perplexity` is its exponential. Both depend on the tokenizer: fewer,
  longer tokens are each harder to predict.
- `bits_per_byte`: the information that the model needs for a byte of UTF-8 text, whatever the tokenizer. It is the
  loss times the tokens of the text (with the marks that are predicted), in bits, over the bytes of the text. A token
  that is not asked (nothing stands before it; the objective shortened the text) counts with the mean. For a causal
  model the text is all of it, for sequence to sequence the target. A masked or denoising model has none: it predicts
  some tokens from neighbours on both sides, and the product of such chances is no chance of the text.
- `unknown_tokens`: how many tokens of that text stand for something that the tokenizer has no token for. Their bytes
  were never predicted, so with many of them bits per byte say too little.
- `accuracy` and `f1` of classifiers; `f1` is the mean over the classes that occur in the labels or the answers
  (macro F1), which a classifier that always says the commonest class does not do well on.
- `exact_match`, `bleu`, `chrf`, `chrf++` of what a sequence-to-sequence model writes (`lathe.train.text_scores`);
  `cut_off` counts texts that reached their limit before the model ended them.

Several tasks are measured one by one. All of them together have a loss, but no common score of what was written:
a mean over a task of words and one of paragraphs says nothing about either.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.checkpoint.atomic import atomic_file
from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.data.corpus import Corpus
from lathe.errors import RequestError
from lathe.generate.settings import Settings, turned_off
from lathe.model.transformer import Transformer
from lathe.objectives.base import Objective
from lathe.objectives.causal import Causal
from lathe.objectives.seq2seq import Seq2Seq
from lathe.train.evaluate import Evaluation, evaluate
from lathe.train.job import Subject, make_objective, open_subject
from lathe.train.loss import autocast
from lathe.train.reading import records, training_corpus
from lathe.train.request import DataSettings, EvaluationSettings
from lathe.train.text_scores import score_texts
from lathe.train.writing import Written, write_all

log = logging.getLogger("lathe")

OnText = Callable[[int, int], None]  # how many more texts are written, and of how many


@dataclass
class _Part:
    """The data of one task (of all, where there is one), opened, and what was found on it."""

    data: DataSettings
    corpus: Corpus
    batches: Batches
    settings: Mapping[str, Any] | None = None  # of generation; None where nothing is written
    found: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)


def measure(request: EvaluationSettings, *, on_text: OnText | None = None) -> dict[str, Any]:
    """Evaluate a model on a file; what applies to its objective, by name.

    Raises:
        RequestError: no such model or file, data that does not fit the model, or a setting that would do nothing.
    """
    subject = open_subject(
        request.model, request.tokenizer, {}, 0, request.device, adapter=request.adapter, quantized=True
    )
    made = make_objective(subject, request.objective or _default_objective(subject, request.data))
    _check_writing(request, made)
    parts = {name: _open(subject, made, data, request) for name, data in _by_task(request.data).items()}
    total = sum(len(part.corpus) for part in parts.values() if part.settings is not None)
    for part in parts.values():
        _measure(subject, made, part, request, None if on_text is None else lambda done: on_text(done, total))
    if request.outputs is not None:
        lines = [{"task": name, **line} if name else line for name, part in parts.items() for line in part.lines]
        with atomic_file(request.outputs) as path:
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    found = {name: part.found for name, part in parts.items()}
    answer = {"objective": made.name, **(found[""] if "" in found else {**_together(found), "tasks": found})}
    return answer if request.outputs is None else {**answer, "outputs": request.outputs}


def _default_objective(subject: Subject, data: DataSettings) -> Mapping[str, Any]:
    architecture = subject.model.architecture
    if data.tasks:
        return {"name": Seq2Seq.name}
    if architecture.head.language is None and architecture.head.classifier is not None:
        return {"name": "classification"}
    if architecture.encoder is None:
        return {"name": "causal"}
    raise RequestError("this model can be asked several things; say which, as objective=masked or objective=seq2seq")


def _check_writing(request: EvaluationSettings, made: Objective) -> None:
    """Refuse what would do nothing, and a file that could not be written, before the work is done."""
    writes = isinstance(made, Seq2Seq) and request.write
    fresh = EvaluationSettings(model=request.model, data=request.data)
    for name in ("generate", "batch", "bleu_tokenize", "outputs"):
        if not writes and getattr(request, name) != getattr(fresh, name):
            why = f"the objective {made.name} writes no text" if request.write else "write=false, so no text is written"
            raise RequestError(f"{name}={getattr(request, name)}: {why}; leave it out")
    if request.generate.get("num_return_sequences", 1) != 1:
        raise RequestError("generate.num_return_sequences: one text is compared with each target; leave it out")
    if request.outputs is not None:
        path = Path(request.outputs).expanduser()
        if path.exists():
            raise RequestError(f"outputs={path} exists; choose another file, or remove it")


def _by_task(data: DataSettings) -> dict[str, DataSettings]:
    """The data of each task; under no name where there are no tasks."""
    if not data.tasks:
        return {"": data}
    return {name: replace(data, tasks={name: values}) for name, values in data.tasks.items()}


def _open(subject: Subject, made: Objective, data: DataSettings, request: EvaluationSettings) -> _Part:
    corpus = training_corpus(data, subject.tokenizer, made, limit=request.limit)
    batches = Batches(
        corpus, made, length=data.length, target_length=data.target_length, rows=data.rows, seed=data.seed
    )
    batches.fit(subject.model.architecture)
    part = _Part(data, corpus, batches)
    if isinstance(made, Seq2Seq) and request.write:
        part.settings = _generation(subject, made, corpus, request.generate)
    return part


_LEAST = ("min_new_tokens", "min_length")  # longer than a text of the data may be


def _left_out(stored: Mapping[str, Any], instead: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand in for some that came with the model, said."""
    if instead:
        names = ", ".join(f"{name}={stored[name]}" for name in instead)
        log.warning("the model asks for %s, which is left out here", names)
    return instead


def _generation(subject: Subject, made: Seq2Seq, corpus: Corpus, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the texts are written with: greedily and with room for each target, unless something else is asked."""
    stored, architecture = subject.generation, subject.model.architecture
    off = _left_out(stored, {name: value for name, value in turned_off(stored).items() if name not in asked})
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, **off, **asked}
    if settings["do_sample"]:
        settings.setdefault("seed", 0)
    # A length that is stored with the model was made for other texts, and would cut these off.
    if all(settings.get(name) is None for name in ("max_new_tokens", "max_length")):
        # Half as long again as the longest target, so that the limit shortens none that is worth its length.
        longest = int(corpus.fields["target"].lengths.max()) + made.special.n_marks
        assert architecture.decoder is not None
        most = architecture.decoder.positions.limit
        settings["max_new_tokens"] = min(longest + longest // 2, most or longest * 2)
        settings |= _left_out(stored, {name: 0 for name in _LEAST if stored.get(name) and name not in asked})
    Settings.resolve(architecture, settings, stored)
    return settings


def _measure(
    subject: Subject, made: Objective, part: _Part, request: EvaluationSettings, on_done: Callable[[int], None] | None
) -> None:
    fixed = part.batches.one_pass()
    loss = evaluate(subject.model, fixed, precision=request.precision)
    part.found |= _loss(loss, len(part.corpus))
    text = "text" if isinstance(made, Causal) else "target" if isinstance(made, Seq2Seq) else None
    if text is not None:
        part.found |= _bits(subject, made, part, text, loss.loss, request.limit)
    if "label" in made.reads:
        classified = classify(subject.model, fixed, precision=request.precision)
        part.found |= {"accuracy": classified.accuracy, "f1": classified.f1}
    if part.settings is not None:
        assert isinstance(made, Seq2Seq)
        written = write_all(
            subject.model,
            subject.tokenizer,
            made,
            part.corpus,
            part.settings,
            stored=subject.generation,
            batch=request.batch,
            on_done=on_done,
        )
        wanted = list(records(part.data, made, validation=False, limit=request.limit))
        part.found |= _scores(written, [record["target"] for record in wanted], part.settings, request.bleu_tokenize)
        part.lines = [
            {"source": record["source"], "reference": record["target"], "output": each.text, "ended": each.ended}
            for record, each in zip(wanted, written, strict=True)
        ]


def _loss(found: Evaluation, documents: int) -> dict[str, Any]:
    # JSON has no infinity, which is what a loss of hundreds of nats comes to.
    perplexity = found.perplexity if math.isfinite(found.perplexity) else None
    return {"documents": documents, "loss": found.loss, "perplexity": perplexity, "targets": found.targets}


def _bits(
    subject: Subject, made: Objective, part: _Part, text: str, loss: float, limit: int | None
) -> dict[str, float | int]:
    """Bits per byte of the field `text`."""
    n_bytes = sum(len(record[text].encode()) for record in records(part.data, made, validation=False, limit=limit))
    if not n_bytes:
        return {"bytes": 0}
    ids = part.corpus.fields[text].flat
    if isinstance(made, Causal):
        marks = part.batches.pieces.n_documents if made.special.eos is not None else 0
    else:
        marks = len(part.corpus) * made.special.n_marks
    unk = subject.tokenizer.unk_id
    return {
        "bytes": n_bytes,
        "bits_per_byte": bits_per_byte(loss, len(ids) + marks, n_bytes),
        "unknown_tokens": 0 if unk is None else int((ids == unk).sum()),
    }


def _scores(
    written: list[Written], references: list[str], settings: Mapping[str, Any], bleu_tokenize: str
) -> dict[str, Any]:
    scores = score_texts([each.text for each in written], references, bleu_tokenize=bleu_tokenize)
    cut_off = sum(not each.ended for each in written)
    return {**scores.to_dict(), "cut_off": cut_off, "generation": dict(settings)}


def _together(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The loss over the labels of all tasks, and the bits over their bytes."""
    parts = found.values()
    targets, n_bytes = (sum(part[key] for part in parts) for key in ("targets", "bytes"))
    mean = Evaluation(sum(part["loss"] * part["targets"] for part in parts) / targets, targets)
    answer = _loss(mean, sum(part["documents"] for part in parts))
    if not n_bytes:
        return answer
    bits = sum(part.get("bits_per_byte", 0.0) * part["bytes"] for part in parts)
    return {**answer, "bytes": n_bytes, "bits_per_byte": bits / n_bytes}


@dataclass(frozen=True)
class Classified:
    """How a classifier's answers compare with the labels."""

    accuracy: float
    f1: float  # the mean over classes
    rows: int


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Bits for each byte of a text.

    Args:
        loss: nats a token.
        tokens: tokens of the text.
        n_bytes: its length in UTF-8.
    """
    return loss * tokens / math.log(2) / n_bytes


def classify(model: Transformer, batches: Iterable[Batch], *, precision: str = "fp32") -> Classified:
    """Accuracy and macro F1 of a classifier, without dropout; the model's mode is left as it was.

    Raises:
        RequestError: the model is no classifier, or there is nothing to classify.
    """
    classifier = model.architecture.head.classifier
    if classifier is None or model.head.language is not None:
        raise RequestError("accuracy is for classifiers; this model has no classifier of its own")
    counts_CC = torch.zeros(classifier.n_labels, classifier.n_labels, dtype=torch.long)  # label × answer
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(model.device, precision):
            for batch in batches:
                inputs = batch.to(model.device).inputs
                logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
                assert logits is not None
                pairs = inputs["labels"].cpu() * classifier.n_labels + logits.argmax(-1).cpu()
                counts_CC += torch.bincount(pairs, minlength=classifier.n_labels**2).view_as(counts_CC)
    finally:
        model.train(was_training)
    rows = int(counts_CC.sum())
    if not rows:
        raise RequestError("nothing to evaluate on: there is no row")
    return Classified(int(counts_CC.trace()) / rows, macro_f1(counts_CC), rows)


def macro_f1(counts_CC: Tensor) -> float:
    """The mean F1 over the classes that occur, from how often each label (row) got each answer (column)."""
    right = counts_CC.diagonal().double()
    seen = (counts_CC.sum(0) + counts_CC.sum(1)).double()  # labels and answers of a class: 2·F1's denominator
    return float((2 * right[seen > 0] / seen[seen > 0]).mean())
