"""A budget instead of sizes: find what to cut so that a model fits, for the least loss on held-out text.

1. *Each axis alone.* Vocabulary, feed-forward, depth, heads, embedding rank and width are each cut for real, refit
   and all, to a few sizes; the deepest is the one with which that axis alone would meet the budget, where it can.
   The loss on held-out text is its price.
2. *Together.* The prices say which sizes together should cost least (`lathe.reshape.budget_search`). That plan is cut
   for real too; what it cost corrects the prices, and the next one is sought.
3. *The choice.* Of everything that was measured and meets the budget, the axes alone included, the lowest loss wins.
   So a plan is never worse, on that text, than the best single axis. Where trials were fitted on a part of the text,
   the best few, the best single axis among them, are first fitted on all of it and measured again.

At most `axes · (effort + 1) + 3 · effort` trials and three last ones are made, none twice. All of it follows from the
text and the seed, except for milliseconds, which the machine says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lathe.architecture import Architecture
from lathe.checkpoint.tensors import DEFAULT_SHARD_BYTES
from lathe.errors import LatheError, RequestError
from lathe.model.transformer import Transformer
from lathe.planner.quantities import written
from lathe.reshape.budget_axes import Axis, Terms, offered, smallest
from lathe.reshape.budget_cost import BudgetSettings, Cost, LatencyCost, cost_of
from lathe.reshape.budget_plan import Alone, BudgetPlan, Row
from lathe.reshape.budget_search import Place, Prices, Search
from lathe.reshape.budget_trial import Probe, Trial, Trials, told
from lathe.reshape.vocabulary import token_ids
from lathe.text.cut import Pieces
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger("lathe")

_MOST_COARSE = 10  # sizes of an axis that plans are sought among
_DEEPEST = 0.75  # share of an axis that cannot meet the budget alone, at its deepest trial
_FINALISTS = 3
_NEAR = 2  # plans that differ by fewer steps than this are one


def plan_budget(
    model: Transformer,
    probe: Probe,
    settings: BudgetSettings,
    *,
    tokenizer: Tokenizer | None = None,
    fixed: Mapping[str, Any] | None = None,
    how: Mapping[str, Any] | None = None,
    seed: int = 0,
    own_form: bool = False,
    reserved: frozenset[int] = frozenset(),
    device: torch.device | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    say: Callable[[str], None] = log.info,
) -> BudgetPlan:
    """The sizes with which a trained model meets a budget at the least loss; see the module.

    Args:
        probe: the text that cuts are fitted and measured on.
        tokenizer: the model's; without it the vocabulary is not cut.
        fixed: fields that are set in any case, before the budget is looked at.
        how: the method and what else `resize` and `planned` take by name.
        seed, own_form, reserved: as `resize` takes them.
        device: where latency is measured; the model's where left out.
        shard_bytes: the size past which the result will be split.
        say: told a line about each trial.

    Raises:
        RequestError: a budget that the model meets already, or that no sizes meet (says the least possible).
    """
    least = None
    if tokenizer is not None and probe.reads_text:
        own, known = token_ids(model.architecture.tokens), set(tokenizer.vocabulary.values())
        least = len(Pieces(tokenizer, (own | reserved) & known).required) + len(own - known)
    timed = settings.milliseconds is not None
    terms = Terms(tuple((how or {}).items()), own_form, tuple((fixed or {}).items()), least, timed)
    trials = Trials(
        model,
        tokenizer,
        probe,
        fixed=fixed or {},
        how=how or {},
        seed=seed,
        own_form=own_form,
        reserved=reserved,
        say=say,
    )
    cost = cost_of(settings, model.architecture, device or model.device, model.dtype, shard_bytes)
    return _Planning(model.architecture, terms, settings, cost, trials).plan()


class _Planning:
    """What is known while a plan is sought."""

    def __init__(
        self, source: Architecture, terms: Terms, settings: BudgetSettings, cost: Cost, trials: Trials
    ) -> None:
        self.source, self.terms, self.settings, self.cost, self.trials = source, terms, settings, cost, trials
        base = terms.architecture(source, {})
        if base is None:
            raise RequestError("the sizes that were given cannot be had; leave them out, or see what lathe plan says")
        self.base, self.limit = base, settings.limit
        self.axes, self.without = offered(source, terms)
        self.before = cost.of(base)
        self._require_possible()
        self.points: dict[str, dict[int, float]] = {}
        self.candidates: list[Trial] = []  # those that meet the budget
        self.alone: dict[str, Trial] = {}

    def plan(self) -> BudgetPlan:
        """Measure, search, choose."""
        effort = self.settings.effort
        most = 1 + len(self.axes) * (effort + 1) + 3 * effort + (0 if self.trials.probe.is_whole() else _FINALISTS)
        self.trials.say(f"budget: {self.cost.text(self.limit)} of {self.cost.text(self.before)}; {most} trials at most")
        start = self.trials.of({}, self.base)
        if start.loss is None:
            raise RequestError(start.why)
        self.start = start.loss
        for axis in list(self.axes):
            self._price(axis)
        if not self.axes:
            raise RequestError(f"nothing can be cut: {next(iter(self.without.values()))}")
        if len(self.axes) > 1:
            self._together()
        return self._chosen()

    def _require_possible(self) -> None:
        name, text = f"max_{_OPTIONS[self.settings.name]}", self.cost.text
        if self.before <= self.limit:
            what = "with the sizes that were given the model" if self.terms.fixed else "the model"
            raise RequestError(
                f"{name}={text(self.limit)}: {what} has {text(self.before)}, which is within it: nothing to cut; "
                "ask for less, or leave the budget out"
            )
        least = smallest(self.source, self.axes, self.terms)
        made = self.terms.architecture(self.source, least)
        if made is None or not least:
            reasons = "; ".join(f"{label}: {why}" for label, why in self.without.items())
            raise RequestError(f"{name}={text(self.limit)}: nothing can be cut ({reasons})")
        lowest = self.cost.of(made)
        if lowest > self.limit:
            sizes = ", ".join(f"{field}={size}" for field, size in self.source.short(least).items())
            exact = f"{lowest:,.0f} {self.cost.unit}" if self.cost.measured == "" else text(lowest)
            raise RequestError(f"{name}={text(self.limit)}: the least possible is {exact} ({sizes}); ask for more")

    # --- each axis alone

    def _price(self, axis: Axis) -> None:
        """Cut one axis to a few sizes, and note the loss of each; an axis that cannot be cut after all is dropped."""
        enough = self._enough(axis)
        deepest = enough or min(axis.sizes, key=lambda size: abs(axis.removed(size) - _DEEPEST))
        number = self.settings.effort + 1
        shares = [axis.removed(deepest) * k / number for k in range(number, 0, -1)]
        wanted = [deepest, *(min(axis.sizes, key=lambda size: abs(axis.removed(size) - s)) for s in shares[1:])]
        found: dict[int, float] = {}
        for size in dict.fromkeys(wanted):
            trial = self.trials.of({axis.field: size}, self.made({axis.field: size}))
            if trial.loss is None:
                self.without[axis.label] = trial.why
                self.axes.remove(axis)
                return
            found[size] = trial.loss - self.start
            if size == enough:
                self.alone[axis.field] = trial
                self.candidates.append(trial)
        self.points[axis.field] = found

    def _enough(self, axis: Axis) -> int | None:
        """The largest size with which this axis alone meets the budget."""
        if self.cost.of(self.made({axis.field: axis.sizes[-1]})) > self.limit:
            return None
        low, high = -1, len(axis.sizes) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost.of(self.made({axis.field: axis.sizes[middle]})) <= self.limit:
                high = middle
            else:
                low = middle
        return axis.sizes[high]

    def made(self, sizes: Mapping[str, int]) -> Architecture:
        """What sizes lead to that can be had."""
        made = self.terms.architecture(self.source, sizes)
        assert made is not None
        return made

    # --- all of them together

    def _together(self) -> None:
        """Try the plans that the prices favour, and correct the prices by what they cost."""
        coarse = [_coarse(axis, self.points[axis.field]) for axis in self.axes]
        prices = Prices(coarse, self.points)
        guess = _Guess(self, coarse)
        tried: list[Place] = []
        left, misses = 3 * self.settings.effort, 3 * self.settings.effort
        search = Search(prices, guess.of, self.limit)
        while left and misses:
            place = next((each for each in search.best() if all(_distance(each, t) >= _NEAR for t in tried)), None)
            if place is None:
                return
            tried.append(place)
            if sum(1 for each in place if each) < 2:
                continue  # one axis alone, which was tried
            sizes = self._filled(_sizes(coarse, place), prices, place)
            made = self.made(sizes)
            actual = self.cost.of(made)
            if actual > self.limit:  # what is timed is not known before
                misses -= 1
                guess.correct(place, actual)
                search = Search(prices, guess.of, self.limit)
                continue
            known = self.trials.count
            trial = self.trials.of(sizes, made)
            if self.trials.count == known:  # as large as the budget allows, it was another plan
                misses -= 1
                continue
            left -= 1
            if trial.loss is None:
                continue
            self.candidates.append(trial)
            prices.learn(place, trial.loss - self.start)

    def _filled(self, sizes: dict[str, int], prices: Prices, place: Place) -> dict[str, int]:
        """The same sizes, the dearest first, as large as the budget still allows."""
        if self.cost.measured:
            return sizes
        order = sorted(range(len(place)), key=lambda n: -prices.weights[n] * prices.alone(n, place[n]))
        by_field = {axis.field: axis for axis in self.axes}
        for number in order:
            field = prices.axes[number].field
            if field not in sizes:
                continue
            others = {name: size for name, size in sizes.items() if name != field}
            made = self.terms.architecture(self.source, others)
            if made is not None and self.cost.of(made) <= self.limit:
                sizes = others  # the other cuts are enough
                continue
            for size in by_field[field].sizes:  # the largest first
                if size <= sizes[field]:
                    break
                made = self.terms.architecture(self.source, {**others, field: size})
                if made is not None and self.cost.of(made) <= self.limit:
                    sizes = {**others, field: size}
                    break
        return sizes

    # --- the choice

    def _chosen(self) -> BudgetPlan:
        ranked = sorted(self.candidates, key=_rank)
        if not ranked:
            raise LatheError(
                "no plan within the budget could be made: "
                + "; ".join(f"{label}: {why}" for label, why in self.without.items())
            )
        if not self.trials.probe.is_whole():
            singles = sorted(self.alone.values(), key=_rank)[:1]
            joint = [each for each in ranked if each not in singles]
            finalists = [*singles, *joint[: _FINALISTS - len(singles)]]
            ranked = sorted((self.trials.of(t.sizes, t.architecture, whole=True) for t in finalists), key=_rank)
        best = ranked[0]
        if best.loss is None:
            raise LatheError(f"the plan cannot be carried out on the whole text: {best.why}")
        self.trials.say(f"the plan: {told(best)}")
        final = {repr(t.sizes): t for t in ranked}
        alone = {field: final.get(repr(t.sizes), t) for field, t in self.alone.items()}
        labels = {axis.field: axis.label for axis in self.axes}
        changes = {**dict(self.terms.fixed), **best.sizes}
        return BudgetPlan(
            unit=self.cost.unit,
            limit=self.limit,
            before=self.before,
            after=self.cost.of(best.architecture),
            loss_before=self.start,
            loss=best.loss,
            changes=changes,
            written=written(self.source.short(changes)),
            rows=tuple(self._rows(best)),
            alone=tuple(
                Alone(labels[field], field, t.sizes[field], self.cost.of(t.architecture), t.loss)
                for field, t in alone.items()
                if t.loss is not None
            ),
            without=self.without,
            trials=tuple(
                {"sizes": dict(t.sizes), "cost": self.cost.of(t.architecture), "loss": t.loss, "why": t.why}
                for t in self.trials.made()
            ),
            measured_on=self.trials.probe.described,
            timed=self.cost.measured,
            given=written(self.source.short(dict(self.terms.fixed))) if self.terms.fixed else "",
        )

    def _rows(self, best: Trial) -> list[Row]:
        """What each axis gives, one after the other, and what a saving in it costs."""
        prices = Prices(self.axes, self.points)
        rows: list[Row] = []
        so_far: dict[str, int] = {}
        at = self.before
        for number, axis in enumerate(self.axes):
            new = int(best.sizes.get(axis.field, axis.old))
            price = self._price_text(axis)
            if new == axis.old:
                rows.append(Row(axis.label, axis.field, axis.old, new, 0.0, None, False, f"kept: {price}"))
                continue
            so_far[axis.field] = new
            made = self.terms.architecture(self.source, so_far)
            now = at if made is None else self.cost.of(made)
            measured = self.points[axis.field].get(new)
            rise = prices.alone(number, axis.sizes.index(new) + 1) if measured is None else measured
            loss = self.start + rise
            rows.append(Row(axis.label, axis.field, axis.old, new, at - now, loss, measured is not None, price))
            at = now
        return rows

    def _price_text(self, axis: Axis) -> str:
        """What was paid for the deepest cut that was measured alone."""
        size = min(self.points[axis.field])
        rise = self.points[axis.field][size]
        saved = self.before - self.cost.of(self.made({axis.field: size}))
        if saved <= 0:
            return f"{size:,} alone saves nothing"
        tenth = 0.1 * self.before
        return f"{rise * tenth / saved:+.3f} nats for each tenth of the {self.cost.unit}, down to {size:,}"


class _Guess:
    """What a place takes, before it is made: exact, or from how much faster each cut alone was."""

    def __init__(self, planning: _Planning, axes: list[Axis]) -> None:
        self._planning, self._axes = planning, axes
        self._is_timed = isinstance(planning.cost, LatencyCost)
        self._scale = 1.0
        self._speed: list[dict[int, float]] = []
        if self._is_timed:
            for axis in axes:
                sizes = planning.points[axis.field]
                cost = {size: planning.cost.of(planning.made({axis.field: size})) for size in sizes}
                self._speed.append({size: value / planning.before for size, value in cost.items()})

    def of(self, place: Place) -> float | None:
        """What it takes; None where the sizes cannot be had together."""
        made = self._planning.terms.architecture(self._planning.source, _sizes(self._axes, place))
        if made is None:
            return None
        return self._scale * self._timed(place) if self._is_timed else self._planning.cost.of(made)

    def correct(self, place: Place, actual: float) -> None:
        """Take it that others are as much slower than guessed."""
        guess = self.of(place)
        if guess:
            self._scale *= max(actual / guess, 1.0 + 1e-3)

    def _timed(self, place: Place) -> float:
        value = self._planning.before
        for number, each in enumerate(place):
            if each:
                axis, known = self._axes[number], self._speed[number]
                # The share that goes and the time are on a line through the deepest cut that was timed.
                size = min(known)
                slope = (1.0 - known[size]) / axis.removed(size)
                value *= max(1.0 - slope * axis.removed(axis.sizes[each - 1]), 1e-3)
        return value


_OPTIONS = {"parameters": "parameters", "bytes": "bytes", "milliseconds": "latency"}


def _rank(trial: Trial) -> tuple[float, int]:
    return math.inf if trial.loss is None else trial.loss, len(trial.sizes)


def _coarse(axis: Axis, points: Mapping[int, float]) -> Axis:
    """The axis with fewer sizes: spread over all of them, and those that were measured."""
    every = axis.sizes
    number = min(_MOST_COARSE, len(every))
    spread = {every[round(k * (len(every) - 1) / max(number - 1, 1))] for k in range(number)}
    return Axis(axis.label, axis.field, axis.old, tuple(sorted(spread | set(points), reverse=True)))


def _sizes(axes: list[Axis], place: Place) -> dict[str, int]:
    return {axis.field: axis.sizes[each - 1] for axis, each in zip(axes, place, strict=True) if each}


def _distance(one: Place, other: Place) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))
