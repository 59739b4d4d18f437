"""Vectors and labels of texts: each is itself alone, in the order given, and what the model's own forward gives."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lathe
from lathe.architecture import Classifier, Pooler
from lathe.errors import RequestError
from lathe.generate import encode as module
from lathe.planner.activations import activations
from lathe.text import Tokenizer, train_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog while seventeen rabbits watch from behind the garden wall",
    "to be or not to be that is the question whether tis nobler in the mind to suffer slings and arrows",
] * 12
WORDS = ["to", "be", "or", "not", "to", "be", "that", "is", "the", "question", "whether", "tis", "nobler"]
SIZES: dict[str, Any] = {"vocab_size": 300, "n_layers": 2, "d_model": 16, "d_ff": 24, "n_heads": 2, "d_head": 8}
LABELS = {"id2label": {"0": "no", "1": "yes", "2": "maybe"}}


@functools.cache
def tokenizer_of(convention: str) -> Tokenizer:
    return train_tokenizer(CORPUS, 300 if convention == "gpt2" else 80, convention=convention)


@functools.cache
def model_of(name: str) -> lathe.Model:
    tokenizer = tokenizer_of("gpt2" if name == "gpt2" else "bert")
    changes: dict[str, Any] = {**SIZES}
    preset = {"gpt2": "gpt2", "t5": "t5-small"}.get(name, "bert-base-uncased")
    if name == "classifier":
        changes |= {
            "head.language": None,
            "head.pooler": Pooler(activation="tanh"),
            "head.classifier": Classifier(n_labels=3),
        }
    if name == "gpt2":
        changes |= {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id}
    architecture = lathe.preset(preset).with_(changes)
    model = lathe.Model(architecture, seed=1, tokenizer=tokenizer, config=LABELS, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


texts_of = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=7)


@pytest.mark.parametrize("name", ["classifier", "gpt2", "t5"])
@given(texts=texts_of, at_once=st.sampled_from([1, 20, 8192]))
@settings(max_examples=10)
def test_a_texts_vectors_are_its_own_whatever_it_is_read_with(name: str, texts: list[str], at_once: int) -> None:
    model = model_of(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", at_once)
        whole = lathe.encode(model, texts, None)
        mean, first = lathe.encode(model, texts), lathe.encode(model, texts, "first")
    assert model.tokenizer is not None
    for row, text in enumerate(texts):
        ids = torch.tensor([model.tokenizer.encode(text)])
        with torch.no_grad():
            alone = (model(ids).last_hidden_state if model.encoder is None else model.encode(ids).hidden_BSD)[0].float()
        torch.testing.assert_close(whole[row], alone)
        torch.testing.assert_close(mean[row], alone.mean(0))
        torch.testing.assert_close(first[row], alone[0])


@given(texts=texts_of, at_once=st.sampled_from([1, 20, 8192]))
@settings(max_examples=10)
def test_labels_and_pooled_states_are_those_of_each_text_alone(texts: list[str], at_once: int) -> None:
    model = model_of("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", at_once)
        labels, pooled = lathe.classify(model, texts), lathe.encode(model, texts, "pooled")
    assert [label.text for label in labels] == texts
    assert model.tokenizer is not None
    for row, (label, text) in enumerate(zip(labels, texts)):
        with torch.no_grad():
            alone = model(torch.tensor([model.tokenizer.encode(text)]))
        torch.testing.assert_close(pooled[row], alone.pooler_output[0].float())
        torch.testing.assert_close(torch.tensor(label.probabilities), alone.logits[0].softmax(-1).float())
        assert label.number == int(alone.logits[0].argmax())
        assert label.label == ("no", "yes", "maybe")[label.number]


def test_batches_are_as_large_as_the_memory_allows_and_the_longest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = model_of("classifier"), []
    texts = [" ".join(WORDS[:n]) for n in (2, 12, 7, 1, 11)]
    handle = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    assert model.tokenizer is not None
    longest = max(map(len, model.tokenizer.encode_batch(texts)))
    layer = activations(model.architecture, 1, longest).stacks[0].layer * 2  # float64
    try:
        monkeypatch.setattr(module, "free_bytes", lambda _: layer * 4 + 1)  # half of it holds two of the longest
        lathe.classify(model, texts)
        assert shapes[0] == (2, longest)
        assert [columns for _, columns in shapes] == sorted((columns for _, columns in shapes), reverse=True)
        assert sum(rows for rows, _ in shapes) == len(texts)
        monkeypatch.setattr(module, "free_bytes", lambda _: layer - 1)
        with pytest.raises(RequestError, match=r"text 2 has .* tokens and does not fit into memory"):
            lathe.classify(model, texts)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lathe.encode(model_of("classifier"), []), "at least one text"),
        (lambda: lathe.encode(model_of("classifier"), "to be"), "at least one text"),
        (lambda: lathe.encode(model_of("gpt2"), ["to", ""]), "text 2 is '' and holds no token"),
        (lambda: lathe.encode(model_of("gpt2"), ["to be"], "pooled"), "this model has no pooler"),
        (lambda: lathe.encode(model_of("gpt2"), ["to be"], "max"), "pool='max'"),  # type: ignore[call-overload]
        (lambda: lathe.encode(model_of("classifier"), ["to be " * 400]), "positions; shorten it"),
        (lambda: lathe.classify(model_of("gpt2"), ["to be"]), "no classifier of texts"),
        (lambda: lathe.encode(lathe.Model(model_of("gpt2").architecture), ["to"]), "no tokenizer"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()


def test_damaged_weights_are_named() -> None:
    model = lathe.Model(model_of("classifier").architecture, seed=0, tokenizer=tokenizer_of("bert"))
    with torch.no_grad():
        model.head.classifier.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"the weight head.classifier.weight holds 1 values"):
        lathe.classify(model, ["to be"])
