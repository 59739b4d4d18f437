"""How good a model is on text that it has not seen.

- `loss`: nats for each label that is asked; `perplexity` is its exponential. Both depend on the tokenizer: fewer,
  longer tokens are each harder to predict.
- `bits_per_byte`: the information that the model needs for a byte of UTF-8 text, whatever the tokenizer.
  It is the loss times the tokens of the text (with the end marks that are predicted), in bits, over the bytes of
  the text. A token that nothing stands before (the first of a piece) is not predicted and counts with the mean.
  For causal models alone: a masked one predicts tokens from their neighbours on both sides.
- `accuracy` and `f1` of classifiers; `f1` is the mean over the classes that occur in the labels or the answers
  (macro F1), which a classifier that always says the commonest class does not do well on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.objectives.causal import Causal
from lathe.train.evaluate import evaluate
from lathe.train.job import Subject, make_objective, open_subject
from lathe.train.loss import autocast
from lathe.train.reading import records, training_corpus
from lathe.train.request import EvaluationSettings


def measure(request: EvaluationSettings) -> dict[str, Any]:
    """Evaluate a model on a file; what applies to its objective, by name.

    Raises:
        RequestError: no such model or file, or data that does not fit the model.
    """
    subject = open_subject(request.model, request.tokenizer, {}, 0, request.device)
    asked = request.objective or _default_objective(subject)
    made, data = make_objective(subject, asked), request.data
    corpus = training_corpus(data, subject.tokenizer, made)
    batches = Batches(
        corpus, made, length=data.length, target_length=data.target_length, rows=data.rows, seed=data.seed
    )
    batches.fit(subject.model.architecture)
    fixed = batches.one_pass()
    found = evaluate(subject.model, fixed, precision=request.precision)
    answer: dict[str, Any] = {
        "objective": made.name,
        "documents": len(corpus),
        "loss": found.loss,
        "perplexity": found.perplexity,
        "targets": found.targets,
    }
    if isinstance(made, Causal):
        n_bytes = sum(len(record["text"].encode()) for record in records(data, made, validation=False))
        ends = len(batches.pieces) if made.special.eos is not None else 0
        answer |= {"bytes": n_bytes, "bits_per_byte": bits_per_byte(found.loss, corpus.n_tokens + ends, n_bytes)}
    if "label" in made.reads:
        classified = classify(subject.model, fixed, precision=request.precision)
        answer |= {"accuracy": classified.accuracy, "f1": classified.f1}
    return answer


def _default_objective(subject: Subject) -> Mapping[str, Any]:
    architecture = subject.model.architecture
    if architecture.head.language is None and architecture.head.classifier is not None:
        return {"name": "classification"}
    if architecture.encoder is None:
        return {"name": "causal"}
    raise RequestError("this model can be asked several things; say which, as objective=masked or objective=seq2seq")


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
