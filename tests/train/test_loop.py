"""The loop: it learns, it repeats itself bit for bit, it accounts rightly, it stops when it should."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from lathe.data import Batch
from lathe.errors import LatheError, RequestError
from lathe.model.transformer import Transformer
from lathe.train import OptimizerSettings, ScheduleSettings, StepReport, TrainSettings, objective_loss, train

FAST = OptimizerSettings(lr=5e-3)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_every_shape_learns(shape: Callable, batches: Callable, name: str):
    model, data = Transformer(shape(name)[0], seed=0), batches(name)
    held = data.one_pass(4)
    result = train(model, data, TrainSettings(steps=60, optimizer=FAST, evaluate_every=20), evaluation=held)
    steps, losses = zip(*((step, found.loss) for step, found in result.evaluations))
    assert steps == (20, 40, 60)
    assert losses[-1] < losses[0]
    assert losses[-1] < 0.9 * math.log(64)
    assert result.tokens_per_second > 0


def test_two_runs_are_the_same_bit_for_bit(shape: Callable, batches: Callable):
    def run() -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.rand(3)  # what a caller has drawn before matters as little
        model = Transformer(shape("t5")[0], seed=0)
        result = train(model, batches("t5"), TrainSettings(steps=8, optimizer=FAST))
        return result.losses, model.state_dict()

    (losses, weights), (again, same) = run(), run()
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_dropout_is_the_steps_own_and_the_callers_generator_is_left_alone(shape: Callable, batches: Callable):
    def losses(seed: int, on_step: Callable | None = None) -> list[float]:
        model = Transformer(shape("t5")[0], seed=0)
        return train(model, batches("t5"), TrainSettings(steps=3, seed=seed), on_step=on_step).losses

    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    first = losses(0)
    assert torch.equal(torch.rand(2), wanted)
    assert losses(0, lambda report: torch.rand(100)) == first
    assert losses(1) != first


def test_accumulating_is_one_large_batch(shape: Callable, batches: Callable):
    def weights(rows: int, accumulate: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = Transformer(shape("gpt2")[0], seed=0)
        settings = TrainSettings(steps=3, accumulate=accumulate, dropout=0.0)
        return train(model, batches("gpt2", rows=rows), settings).losses, model.state_dict()

    (large, one), (small, four) = weights(8, 1), weights(2, 4)
    assert small == pytest.approx(large, rel=1e-5)
    for name in one:
        torch.testing.assert_close(four[name], one[name], atol=1e-4, rtol=1e-3, msg=name)


def test_recomputing_activations_changes_nothing(shape: Callable, batches: Callable):
    def losses(checkpointing: bool) -> list[float]:
        model = Transformer(shape("t5")[0], seed=0)
        found = train(model, batches("t5"), TrainSettings(steps=4, optimizer=FAST, checkpointing=checkpointing)).losses
        assert model.encoder is not None
        assert not model.encoder.checkpointing
        return found

    assert losses(True) == losses(False)


def test_the_model_is_left_as_it_was_found(shape: Callable, batches: Callable):
    model = Transformer(shape("t5")[0], seed=0).eval()
    seen: list[tuple] = []

    def loss(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int]:
        assert model.encoder is not None
        seen.append((model.training, model.encoder.dropout.p, model.encoder.attention[0].dropout))
        return objective_loss(model, batch)

    train(model, batches("t5"), TrainSettings(steps=1, dropout=0.3), loss_fn=loss)
    assert seen == [(True, 0.3, 0.3)]
    assert not model.training
    assert model.encoder is not None
    assert model.encoder.dropout.p == model.encoder.attention[0].dropout == 0.1


def test_bf16_stays_near_fp32(shape: Callable, batches: Callable):
    def losses(precision: str) -> list[float]:
        model = Transformer(shape("gpt2")[0], seed=0)
        return train(model, batches("gpt2"), TrainSettings(steps=3, precision=precision)).losses

    plain, half = losses("fp32"), losses("bf16")
    assert half == pytest.approx(plain, rel=1e-2)
    assert half != plain


def test_budgets_end_the_run(shape: Callable, batches: Callable):
    def steps(**budget) -> list[StepReport]:
        return train(Transformer(shape("gpt2")[0], seed=0), batches("gpt2"), TrainSettings(**budget)).steps

    by_steps = steps(steps=3)
    assert [report.step for report in by_steps] == [1, 2, 3]
    assert [report.progress for report in by_steps] == pytest.approx([1 / 3, 2 / 3, 1])
    counted = [batch.tokens for batch in itertools.islice(batches("gpt2"), 3)]
    assert [report.tokens for report in by_steps] == list(itertools.accumulate(counted))
    assert len(steps(tokens=counted[0] + 1)) == 2
    assert len(steps(steps=5, tokens=counted[0])) == 1
    assert len(steps(seconds=1e-9)) == 1


def test_data_that_ends_ends_the_run(shape: Callable, batches: Callable):
    model = Transformer(shape("gpt2")[0], seed=0)
    finite = list(itertools.islice(batches("gpt2"), 5))
    assert len(train(model, finite, TrainSettings(steps=100, accumulate=2)).steps) == 3
    with pytest.raises(RequestError, match="no batch to train on"):
        train(model, [], TrainSettings(steps=1))


def test_the_schedule_reaches_the_optimiser(shape: Callable, batches: Callable):
    settings = TrainSettings(
        steps=4, optimizer=OptimizerSettings(lr=0.01), schedule=ScheduleSettings(kind="linear", warmup=2)
    )
    reports = train(Transformer(shape("gpt2")[0], seed=0), batches("gpt2"), settings).steps
    assert [report.lr for report in reports] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_gradients_are_clipped(shape: Callable, batches: Callable):
    def moved(clip: float | None) -> tuple[float, torch.Tensor]:
        model = Transformer(shape("gpt2")[0], seed=0)
        before = model.embedding.tokens.weight.detach().clone()
        # Adam forgets the gradient's size; with eps this large it does not.
        optimizer = OptimizerSettings(lr=1.0, eps=1e3, weight_decay=0.0, clip=clip)
        report = train(model, batches("gpt2"), TrainSettings(steps=1, optimizer=optimizer)).steps[0]
        return report.gradient_norm, model.embedding.tokens.weight.detach() - before

    norm, free = moved(None)
    same_norm, clipped = moved(norm / 4)
    assert norm == same_norm
    torch.testing.assert_close(clipped, free / 4, rtol=1e-2, atol=1e-8)


def test_a_loss_that_is_no_number_stops_before_the_weights_move(shape: Callable, batches: Callable):
    model, calls = Transformer(shape("gpt2")[0], seed=0), itertools.count(1)
    kept: list[torch.Tensor] = []

    def loss(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int]:
        found, n = objective_loss(model, batch)
        if next(calls) == 3:
            kept.append(model.embedding.tokens.weight.detach().clone())
            return found * math.nan, n
        return found, n

    with pytest.raises(LatheError, match=r"the loss is nan at step 3 \(epoch 0, row 8\)"):
        train(model, batches("gpt2"), TrainSettings(steps=10), loss_fn=loss)
    assert torch.equal(model.embedding.tokens.weight.detach(), kept[0])


def test_a_spike_stops_the_run_unless_it_is_allowed(shape: Callable, batches: Callable):
    def run(spike: float | None) -> Sequence[StepReport]:
        calls = itertools.count(1)

        def loss(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int]:
            found, n = objective_loss(model, batch)
            return (found + 10.0, n) if next(calls) == 55 else (found, n)

        model = Transformer(shape("gpt2")[0], seed=0)
        return train(model, batches("gpt2", rows=1), TrainSettings(steps=56, spike=spike), loss_fn=loss).steps

    with pytest.raises(LatheError, match=r"at step 55 .* nats above the mean of the last 50"):
        run(3.0)
    assert len(run(None)) == 56


def test_a_model_that_does_not_fit_the_data_is_refused(shape: Callable, batches: Callable):
    with pytest.raises(RequestError, match="trains a model with decoder"):
        train(Transformer(shape("t5")[0], seed=0), batches("gpt2"), TrainSettings(steps=1))


def test_compiled_layers_compute_the_same_and_are_put_back(
    shape: Callable, batches: Callable, monkeypatch: pytest.MonkeyPatch
):
    import torch._dynamo

    # The layers take the compiler's way in and out; its code generator, which takes a minute, is left out.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    model = Transformer(shape("gpt2")[0], seed=0)
    entered: set[str] = set()

    def loss(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int]:
        entered.update(type(m).__name__ for m in model.modules() if m._compiled_call_impl is not None)
        return objective_loss(model, batch)

    compiled = train(model, batches("gpt2"), TrainSettings(steps=2, compile=True), loss_fn=loss).losses
    assert entered == {"AttentionLayer", "FeedForwardLayer"}
    assert all(m._compiled_call_impl is None for m in model.modules())
    plain = Transformer(shape("gpt2")[0], seed=0)
    assert compiled == train(plain, batches("gpt2"), TrainSettings(steps=2)).losses
