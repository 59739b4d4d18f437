"""The loss at label positions is the model's own loss, for less work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lathe.data import Batch
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.objectives import IGNORED
from lathe.presets import preset
from lathe.train import evaluate, label_logits, objective_loss


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_it_is_the_loss_that_the_model_computes(shape: Callable, batches: Callable, name: str):
    model = Transformer(shape(name)[0], seed=0).eval()
    batch = next(batches(name))
    whole = model(**batch.inputs).loss
    whole.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss, targets = objective_loss(model, batch)
    loss.backward()
    assert targets == batch.targets
    torch.testing.assert_close(loss, whole)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], msg=n, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_only_logits_that_are_asked_are_computed(shape: Callable, batches: Callable, name: str):
    model = Transformer(shape(name)[0], seed=0).eval()
    batch = next(batches(name))
    logits, targets, _ = label_logits(model, batch)
    assert logits.shape == (batch.targets, model.architecture.embedding.vocab_size)
    assert targets.shape == (batch.targets,)
    assert model.head.language is not None
    assert not model.head.language._forward_pre_hooks, "the head goes on reading part of what it is given"


def test_a_sentence_label_adds_its_own_loss(shape: Callable, batches: Callable):
    model = Transformer(shape("bert")[0].with_(head=preset("bert-base-uncased", head="pretraining").head), seed=0)
    model.eval()
    batch = next(batches("bert"))
    batch.inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    loss, _ = objective_loss(model, batch)
    torch.testing.assert_close(loss, model(**batch.inputs).loss)


def test_a_classifier_learns_its_labels(shape: Callable):
    model = Transformer(
        shape("bert")[0].with_(head=preset("bert-base-uncased", head="classification").head), seed=0
    ).eval()
    batch = Batch({"input_ids": torch.tensor([[2, 9, 3], [2, 8, 3]]), "labels": torch.tensor([0, 1])}, 6, 2)
    loss, targets = objective_loss(model, batch)
    assert targets == 2
    torch.testing.assert_close(loss, model(**batch.inputs).loss)


def test_evaluation_weighs_batches_by_their_labels(shape: Callable, batches: Callable):
    model = Transformer(shape("gpt2")[0], seed=0).train()
    found = evaluate(model, batches("gpt2", rows=5).one_pass())
    one = evaluate(model, batches("gpt2", rows=100).one_pass())
    assert found.targets == one.targets
    assert found.loss == pytest.approx(one.loss, rel=1e-5)
    assert model.training


def test_nothing_to_evaluate_on_is_refused(shape: Callable, batches: Callable):
    model = Transformer(shape("gpt2")[0], seed=0)
    with pytest.raises(RequestError, match="nothing to evaluate on"):
        evaluate(model, [])
    batch = next(batches("gpt2"))
    batch.inputs["labels"].fill_(IGNORED)
    with pytest.raises(RequestError, match="nothing to evaluate on"):
        evaluate(model, [batch])
