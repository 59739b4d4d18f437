"""Distillation: the divergence from a teacher, and that the loop learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lathe.errors import RequestError
from lathe.model.output import Output
from lathe.model.transformer import Transformer
from lathe.presets import preset
from lathe.train import Distillation, OptimizerSettings, TrainSettings, distil, label_logits, objective_loss, train
from lathe.train.loss import autocast


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(shape: Callable, batches: Callable, name: str):
    model = Transformer(shape(name)[0], seed=0).eval()
    batch = next(batches(name))
    for top_k in (None, 5):
        loss, targets = Distillation(model, weight=1.0, temperature=2.0, top_k=top_k)(model, batch)
        assert loss.item() == pytest.approx(0.0, abs=1e-5)
        assert targets == batch.targets


def test_the_loss_is_the_weighted_sum(shape: Callable, batches: Callable):
    teacher = Transformer(shape("t5")[0], seed=1).eval()
    student = Transformer(shape("t5")[0], seed=0).eval()
    batch = next(batches("t5"))
    wanted = label_logits(student, batch)[0].double()
    seen = label_logits(teacher, batch)[0].double()
    for temperature in (1.0, 2.0):
        p, q = (seen / temperature).softmax(-1), (wanted / temperature).softmax(-1)
        divergence = (p * (p / q).log()).sum(-1).mean() * temperature**2
        hard = objective_loss(student, batch)[0]
        loss, _ = Distillation(teacher, weight=0.25, temperature=temperature)(student, batch)
        assert loss.item() == pytest.approx(0.25 * divergence.item() + 0.75 * hard.item(), rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 100, 2**18])
def test_the_gradient_is_that_of_the_plain_formula(
    shape: Callable, batches: Callable, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(distil._AT_ONCE, "cpu", at_once)
    teacher, student = (Transformer(shape("t5")[0], seed=seed).eval() for seed in (1, 0))
    batch, loss_fn = next(batches("t5")), Distillation(teacher, weight=1.0, temperature=2.0)
    ours = torch.autograd.grad(loss_fn(student, batch)[0], list(student.parameters()))
    p, q = ((label_logits(each, batch)[0] / 2.0).softmax(-1) for each in (teacher, student))
    plain = torch.autograd.grad(4.0 * (p.detach() * (p.detach() / q).log()).sum(-1).mean(), list(student.parameters()))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_hidden_states_of_any_two_widths_are_compared(shape: Callable, batches: Callable, name: str):
    architecture = shape(name)[0]
    teacher = Transformer(architecture, seed=1).eval()
    batch = next(batches(name))
    same, _ = Distillation(teacher, weight=1.0, hidden=1.0)(teacher, batch)
    assert same.item() == pytest.approx(0.0, abs=1e-5)
    narrow = Transformer(architecture.with_(d_model=8, d_head=4), seed=0).eval()
    without, _ = Distillation(teacher)(narrow, batch)
    once, _ = Distillation(teacher, hidden=1.0)(narrow, batch)
    twice, _ = Distillation(teacher, hidden=2.0)(narrow, batch)
    assert once > without
    assert (twice - without).item() == pytest.approx(2 * (once - without).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_noise_swaps_what_both_models_read_and_nothing_special(shape: Callable, batches: Callable, name: str):
    architecture, objective = shape(name)
    read: list[dict[str, Any]] = []

    class Reading(Transformer):
        def forward(self, *given: Any, **inputs: Any) -> Output:
            read.append(inputs)
            return super().forward(*given, **inputs)

    teacher, student = (Reading(architecture, seed=seed).eval() for seed in (0, 1))
    batch = next(batches(name))
    special = objective.special.ids
    noisy = Distillation(teacher, weight=1.0, noise=0.5, keep=special)
    first, again = noisy(student, batch)[0].item(), noisy(student, batch)[0].item()
    assert first == again  # the same tokens whenever the batch comes: a run that goes on sees what it would have seen
    assert first != Distillation(teacher, weight=1.0)(student, batch)[0].item()
    assert {0, 1, 2, 3, 4, 54, 63} <= special  # of which an architecture knows no CLS, no SEP and no sentinels
    for key in ("input_ids", "decoder_input_ids"):
        if key not in batch.inputs:
            continue
        old = batch.inputs[key]
        assert torch.equal(read[0][key], read[1][key])  # the student's and the teacher's
        plain = ~torch.isin(old, torch.tensor(sorted(special)))
        if "segment_ids" in batch.inputs:
            plain &= batch.inputs[key.replace("input_ids", "segment_ids")] >= 0
        changed = read[0][key] != old
        assert not (changed & ~plain).any()
        assert 0.2 < float(changed[plain].float().mean()) <= 0.7
        assert torch.isin(read[0][key], old).all()
    for key in read[0].keys() & batch.inputs.keys() - {"input_ids", "decoder_input_ids"}:
        assert torch.equal(read[0][key], batch.inputs[key])


def test_the_rest_counts_as_one_token(shape: Callable, batches: Callable):
    teacher = Transformer(shape("gpt2")[0], seed=1).eval()
    student = Transformer(shape("gpt2")[0], seed=0).eval()
    batch = next(batches("gpt2"))
    p, q = (label_logits(each, batch)[0].double().softmax(-1) for each in (teacher, student))
    likeliest = p.topk(3, dim=-1).indices
    p, q = p.gather(-1, likeliest), q.gather(-1, likeliest)
    p, q = (torch.cat((each, 1 - each.sum(-1, keepdim=True)), -1) for each in (p, q))
    loss, _ = Distillation(teacher, weight=1.0, top_k=3)(student, batch)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


@pytest.fixture
def sentences(batches: Callable) -> tuple[Transformer, Transformer, Any]:
    """A student and a teacher with BERT's pretraining heads, and a batch that asks both."""
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 32, "vocab_size": 64}
    shape = preset("bert-base-uncased", head="pretraining").with_(**sizes, max_positions=32)
    batch = next(batches("bert"))
    asked = {**batch.inputs, "next_sentence_label": torch.arange(len(batch.inputs["input_ids"])) % 2}
    teacher, student = (Transformer(shape, seed=seed).double().eval() for seed in (1, 0))
    for each in (teacher, student):
        assert each.head.classifier is not None
        each.head.classifier.weight.data *= 50.0  # so that the two differ by more than rounding
    return teacher, student, replace(batch, inputs=asked, row_weight=0.5)


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_sentence_head_learns_from_its_teacher_and_from_its_labels(
    sentences: tuple[Transformer, Transformer, Any], top_k: int | None
):
    teacher, student, batch = sentences
    hard = objective_loss(student, batch)[0].item()
    assert Distillation(teacher, weight=0.0)(student, batch)[0].item() == pytest.approx(hard, rel=1e-6)
    found = (label_logits(each, batch)[2].seq_relationship_logits for each in (teacher, student))
    p, q = ((each / 2.0).double().softmax(-1) for each in found if each is not None)
    rows = (p * (p / q).log()).sum(-1).mean().item() * 4.0
    soft = Distillation(teacher, weight=1.0, temperature=2.0, top_k=top_k)
    of_tokens = soft(student, replace(batch, row_weight=0.0))[0].item()
    assert soft(student, batch)[0].item() == pytest.approx(of_tokens + 0.5 * rows, rel=1e-5)
    mixed = Distillation(teacher, weight=0.25, temperature=2.0, top_k=top_k)(student, batch)[0].item()
    assert mixed == pytest.approx(0.25 * (of_tokens + 0.5 * rows) + 0.75 * hard, rel=1e-5)


def test_a_sentence_head_goes_along_where_the_text_asks_it_nothing(sentences: tuple[Transformer, Transformer, Any]):
    teacher, student, batch = sentences
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "next_sentence_label"}
    loss, _ = Distillation(teacher, weight=1.0)(student, replace(batch, inputs=inputs))
    assert student.head.classifier is not None
    (slope,) = torch.autograd.grad(loss, [student.head.classifier.weight])
    assert slope.abs().max() > 0


def test_matrix_products_in_bfloat16_leave_the_loss_as_exact_as_it_is(shape: Callable, batches: Callable):
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 64, 500).unbind()
    loss_fn = Distillation(Transformer(shape("gpt2")[0], seed=1).eval(), weight=1.0)
    plain = loss_fn._divergence(ours, theirs), distil._cosines(ours[None])
    with autocast(torch.device("cpu"), "bf16"):
        cast = loss_fn._divergence(ours, theirs), distil._cosines(ours[None])
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_a_float64_student_is_compared_in_float64(shape: Callable, batches: Callable):
    teacher, student = (Transformer(shape("gpt2")[0], seed=seed).double().eval() for seed in (1, 0))
    batch = next(batches("gpt2"))
    p, q = (label_logits(each, batch)[0].softmax(-1) for each in (teacher, student))
    hard = label_logits(student, batch)[0].log_softmax(-1).gather(-1, label_logits(student, batch)[1][:, None]).mean()
    plain = 0.5 * (p * (p / q).log()).sum(-1).mean() - 0.5 * hard
    loss, _ = Distillation(teacher)(student, batch)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)


def test_where_no_gradient_is_wanted_none_is_kept(shape: Callable, batches: Callable, monkeypatch: pytest.MonkeyPatch):
    teacher, student = (Transformer(shape("gpt2")[0], seed=seed).eval() for seed in (1, 0))
    loss_fn, batch = Distillation(teacher, weight=1.0), next(batches("gpt2"))
    wanted = loss_fn(student, batch)[0].item()
    made: list[torch.Size] = []

    def empty_like(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor.shape)
        return torch.zeros_like(tensor)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    with torch.no_grad():
        assert loss_fn(student, batch)[0].item() == wanted
    assert not made
    loss_fn(student, batch)
    assert made


def test_the_loop_moves_the_student_towards_its_teacher(shape: Callable, batches: Callable):
    teacher = Transformer(shape("gpt2")[0], seed=1).eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = Transformer(shape("gpt2")[0], seed=0)
    settings = TrainSettings(steps=30, optimizer=OptimizerSettings(lr=3e-3))
    result = train(student, batches("gpt2"), settings, loss_fn=Distillation(teacher, weight=1.0))
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_what_cannot_be_is_refused(shape: Callable, batches: Callable):
    teacher = Transformer(shape("gpt2")[0], seed=1).eval()
    for values, words in (
        ({"weight": 1.5}, "weight=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": 64}, "top_k=64"),
        ({"noise": 1.0}, "noise=1.0"),
    ):
        with pytest.raises(RequestError, match=words):
            Distillation(teacher, **values)
    student = Transformer(shape("gpt2")[0].with_(vocab_size=70), seed=0)
    with pytest.raises(RequestError, match="student's vocabulary is 70 and the teacher's 64"):
        Distillation(teacher)(student, next(batches("gpt2")))


def test_other_labels_of_a_sentence_head_are_refused(sentences: tuple[Transformer, Transformer, Any]):
    teacher, student, batch = sentences
    other = Transformer(student.architecture.with_({"head.classifier.n_labels": 3}), seed=0).double()
    with pytest.raises(RequestError, match="has 3 labels and the teacher's 2"):
        Distillation(teacher, weight=1.0)(other, batch)
