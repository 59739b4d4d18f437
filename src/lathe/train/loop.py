"""The loop: batches in, gradients, a step, a report; the same for pretraining, fine-tuning and healing.

    result = train(model, batches, TrainSettings(steps=500), evaluation=batches.one_pass(8))

A step takes `accumulate` batches, and its loss is the mean over all their labels: batches that ask more
count more, so accumulating gives what one large batch would. Dropout is drawn from (seed, step), so a run
can continue from any step without the state of a generator, and what a caller draws between steps changes
nothing. The loop prints nothing and writes nothing; whoever wants to know passes `on_step`.

Several ranks (`lathe.train.ranks`) each take their rows of every batch, and the step is the one that a single
process would have taken: the mean over all labels of all ranks, clipped by the norm of the whole gradient. Every
number of a report is that of all ranks together. Only dropout differs: each rank draws its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.attention import AttentionLayer
from lathe.model.feed_forward import FeedForwardLayer
from lathe.model.transformer import Transformer
from lathe.train.evaluate import Evaluation, evaluate
from lathe.train.health import Health
from lathe.train.loss import SENTENCE_LABELS, LossFunction, autocast, objective_loss
from lathe.train.optimiser import load_named_state, make_optimizer, named_state
from lathe.train.parallel import Spread
from lathe.train.ranks import ALONE, Ranks
from lathe.train.schedule import rate
from lathe.train.settings import TrainSettings


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int  # counted from 1
    loss: float  # nats a target
    lr: float
    gradient_norm: float  # before clipping
    tokens: int  # of all steps so far, padding not counted
    seconds: float  # since the start
    progress: float  # the share of the budget that is spent
    targets: int = 0  # labels of all steps so far
    batch: str = ""  # the name of the step's first batch: where in the data it was
    evaluation: Evaluation | None = None


@dataclass
class TrainResult:
    """What a run did; `steps` lists every step's report."""

    steps: list[StepReport] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [report.loss for report in self.steps]

    @property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """Each evaluation, with the step after which it was made."""
        return [(r.step, r.evaluation) for r in self.steps if r.evaluation is not None]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over the whole run, evaluation included."""
        return self.steps[-1].tokens / max(self.steps[-1].seconds, 1e-9) if self.steps else 0.0


def train(
    model: Transformer,
    batches: Iterable[Batch],
    settings: TrainSettings,
    *,
    loss_fn: LossFunction = objective_loss,
    evaluation: Sequence[Batch] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    run: Run | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train `model` in place until its budget is spent or the batches end.

    Args:
        batches: taken one after another; `lathe.data.Batches` never ends.
        loss_fn: `(model, batch) -> (mean loss, how many labels)`.
        evaluation: a fixed set, evaluated with the labels' own loss every `evaluate_every` steps and at the end.
        on_step: called after each step, on every rank.
        run: a run to go on with, made of the same model, settings and ranks; a new one where left out.
        ranks: the processes that share the work, each of which calls this with its own rows of the same number of
            batches, and with the same weights. Sharded, `model` waits on the CPU until the end.

    Raises:
        LatheError: the loss is no number or has run away; the weights are those before that step.
        RequestError: nothing to train, or no batch.
    """
    fit = getattr(batches, "fit", None)
    if fit is not None:
        fit(model.architecture)
    run = run or Run(model, settings, loss_fn, ranks)
    source, result = iter(batches), TrainResult()
    with training(run.model, settings):
        while run.progress < 1.0 and not run.stopped:
            group = _take(source, settings.accumulate)
            if not group:
                break
            report = run.step(group)
            if evaluation is not None and run.wants_evaluation():
                measured = run.evaluate(evaluation)
                report = StepReport(**{**vars(report), "evaluation": measured})
            result.steps.append(report)
            if on_step is not None:
                on_step(report)
    if not result.steps:
        raise RequestError("no batch to train on: the data ended before the first step")
    if evaluation is not None and result.steps[-1].evaluation is None:
        measured = run.evaluate(evaluation)
        result.steps[-1] = StepReport(**{**vars(result.steps[-1]), "evaluation": measured})
    run.publish()
    return result


class Run:
    """The state of a run between two steps: optimiser, counts, health. Set `stopped` to end it early.

    `model` is what is trained: the model that was given, or a sharded copy of it (`lathe.train.parallel`).
    """

    def __init__(
        self, model: Transformer, settings: TrainSettings, loss_fn: LossFunction, ranks: Ranks = ALONE
    ) -> None:
        self.settings, self.loss_fn, self.ranks = settings, loss_fn, ranks
        self.spread = Spread(model, settings, ranks)
        self.model = self.spread.model
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.health = Health(settings.spike)
        self.steps, self.tokens, self.targets, self.seconds = 0, 0, 0, 0.0
        self.stopped = False

    def state_dict(self) -> dict[str, Any]:
        """Counts and health as plain JSON values; with `tensors` and the model, all that the next step depends on."""
        counts = {name: getattr(self, name) for name in ("steps", "tokens", "targets", "seconds")}
        return {**counts, "recent_losses": list(self.health.recent)}

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state under the parameters' names, whole; on the main rank, though every rank calls it."""
        return self.spread.gathered(named_state(self.model, self.optimizer))

    def publish(self) -> None:
        """Bring the weights to the model that the run was made of, where that is another. Every rank calls it."""
        self.spread.publish()

    def load_state_dict(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> None:
        """Go on from what `state_dict` and `tensors` gave, with these weights; on any number of ranks."""
        self.spread.load(weights)
        load_named_state(self.model, self.optimizer, self.spread.parts(tensors))
        for name in ("steps", "tokens", "targets", "seconds"):
            setattr(self, name, state[name])
        self.health.recent.extend(state["recent_losses"])

    @property
    def progress(self) -> float:
        """Which share of the budget is spent; of several budgets, of the one that ends first."""
        s = self.settings
        spent = ((self.steps, s.steps), (self.tokens, s.tokens), (self.seconds, s.seconds))
        return max(done / budget for done, budget in spent if budget is not None)

    def wants_evaluation(self) -> bool:
        """Whether the step just made is one after which to evaluate."""
        every = self.settings.evaluate_every
        return self.progress >= 1.0 or (every is not None and self.steps % every == 0)

    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """The labels' own loss on a fixed set, which every rank holds whole."""

        def judge(_: Transformer, batch: Batch) -> tuple[Tensor, int]:
            return self.spread.judge(batch, objective_loss)

        precision = self.settings.precision
        found = evaluate(self.model, batches, loss_fn=judge, precision=precision, ranks=self.ranks)
        self.spread.rest()
        return found

    def step(self, group: Sequence[Batch]) -> StepReport:
        """One step on these batches: gradients of all, then one move of the weights."""
        started = time.perf_counter()
        lr = self.settings.optimizer.lr * rate(self.settings.schedule, self.steps, self.progress)
        torch.manual_seed(_mix(self.settings.seed, self.steps, self.ranks.rank))
        loss, tokens, targets = self._backward(self._weighed(group))
        norm = self._clip()
        self.health.check(self.steps + 1, loss, norm, group[0].name or "no name")
        for params in self.optimizer.param_groups:
            params["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += tokens
        self.targets += targets
        self.seconds += time.perf_counter() - started
        if self.settings.seconds is not None:  # ranks must agree on when it is spent
            self.seconds = self.ranks.sum((self.seconds if self.ranks.main else 0.0,))[0]
        done = min(self.progress, 1.0)
        return StepReport(self.steps, loss, lr, norm, self.tokens, self.seconds, done, self.targets, group[0].name)

    def _weighed(self, group: Sequence[Batch]) -> Sequence[Batch]:
        """The group, each batch with the weight at which a mean over rows becomes one over all rows of the step.

        Batches are weighed by their targets. A label of the row as a whole has to count by rows all the same.
        """
        if (len(group) == 1 and self.ranks.size == 1) or not any(label in group[0].inputs for label in SENTENCE_LABELS):
            return group
        counts = [len(batch.inputs["input_ids"]) for batch in group]
        rows, targets = self.ranks.sum((sum(counts), sum(batch.targets for batch in group)))
        return [
            replace(batch, row_weight=n / rows * targets / max(batch.targets, 1)) for batch, n in zip(group, counts)
        ]

    def _backward(self, group: Sequence[Batch]) -> tuple[float, int, int]:
        """Gradients of the mean loss over every label of the step; that loss, and the step's tokens and targets."""
        alone = len(group) == 1 and self.ranks.size == 1
        total, asked = 0.0, 0
        for number, batch in enumerate(group, start=1):
            with self.spread.adding_up(last=number == len(group)):
                moved = batch.to(self.model.device)
                with autocast(self.model.device, self.settings.precision):
                    loss, n = self.spread.loss(moved, self.loss_fn)
                # A batch without targets counts nothing; its loss of a row as a whole does.
                weight = max(n, 1)
                (loss if alone else loss * weight).backward()
            total, asked = total + loss.item() * weight, asked + n
        counts = (sum(batch.tokens for batch in group), sum(batch.targets for batch in group))
        total, all_asked, tokens, targets = self.ranks.sum((total, asked, *counts))
        if not all_asked:
            raise RequestError(f"the batch {group[0].name!r} asks no label: nothing to learn from")
        if not alone:
            # The ranks' gradients were averaged.
            scale = self.ranks.size / all_asked
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)
        return total / all_asked, int(tokens), int(targets)

    def _clip(self) -> float:
        limit = self.settings.optimizer.clip
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.spread.whole(nn.utils.get_total_norm(gradients))
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm.item()


@contextmanager
def training(model: Transformer, settings: TrainSettings) -> Iterator[None]:
    """The model in training mode as the settings want it; everything as it was afterwards.

    The generators of the process are put back too: a run leaves no trace in what a caller draws next.
    """
    was_training = model.training
    stacks = [stack for stack in (model.encoder, model.decoder) if stack is not None]
    checkpointing = [stack.checkpointing for stack in stacks]
    dropouts = dropout_of(model)
    devices = [model.device] if model.device.type == "cuda" else []
    compiled = [m for m in model.modules() if settings.compile and isinstance(m, AttentionLayer | FeedForwardLayer)]
    with torch.random.fork_rng(devices=devices):
        model.train()
        if settings.checkpointing:
            model.set_checkpointing(True)
        if settings.dropout is not None:
            set_dropout(dict.fromkeys(dropouts, settings.dropout))
        for module in compiled:
            module.compile()
        try:
            yield
        finally:
            model.train(was_training)
            for module in compiled:
                module._compiled_call_impl = None  # what `Module.compile` sets, and nothing else undoes
            for stack, was in zip(stacks, checkpointing):
                stack.checkpointing = was
            set_dropout(dropouts)


def dropout_of(model: nn.Module) -> dict[nn.Module, float]:
    """Every module that drops something, and the probability with which it does."""
    dropping: dict[nn.Module, float] = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    return dropping | {m: m.dropout for m in model.modules() if isinstance(m, AttentionLayer)}


def set_dropout(probabilities: Mapping[nn.Module, float]) -> None:
    """Give modules that `dropout_of` found other probabilities."""
    for module, p in probabilities.items():
        setattr(module, "dropout" if isinstance(module, AttentionLayer) else "p", p)


def _take(source: Iterator[Batch], count: int) -> list[Batch]:
    return [batch for _, batch in zip(range(count), source)]


def _mix(seed: int, step: int, rank: int) -> int:
    # Far apart for near steps, seeds and ranks, and below 2^63, which is what every backend's generator takes.
    mixed = (seed * 0x9E3779B97F4A7C15) ^ (step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) ^ (rank * 0xD6E8FEB86659FD93)
    return mixed & (2**63 - 1)
