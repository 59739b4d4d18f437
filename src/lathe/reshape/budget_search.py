"""Where a budget is spent: from the price of each axis on its own to sizes of all of them together.

Each axis was cut to a few sizes, the others left as they were, and the loss on held-out text measured. Between the
sizes measured, the loss is taken to rise in straight lines with the share of the axis that goes, and beyond the last
one twice as steeply. A plan's loss is taken to be the sum of what its cuts cost alone.

That is a first guess: cuts get in each other's way, or two axes hold the same thing and the second cut is nearly
free. So a plan is tried, and what it cost beside the guess is laid on its axes, each in the share that it had in the
guess; the next plan is sought at the new prices. The search itself is exact about what a plan saves: it starts from
every axis' own cut and from the cheapest cuts first, and moves by single steps and exchanges between two axes as long
as the guess falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from lathe.reshape.budget_axes import Axis

# For each axis, which of its sizes: 0 as it is, n the n-th smaller.
Place = tuple[int, ...]

_MOST_MOVES = 200
_BEYOND = 2.0  # how much steeper the loss rises past the last size measured
_MOST_BLAME = 4.0  # by how much one trial may change a price


class Prices:
    """What cuts cost, in nats: measured alone, and corrected by plans that were tried.

    Args:
        points: for each axis, sizes and how much the loss rose there.
    """

    def __init__(self, axes: Sequence[Axis], points: Mapping[str, Mapping[int, float]]) -> None:
        self.axes = list(axes)
        self._curves = [_rising(axis, points[axis.field]) for axis in axes]
        self.weights = [1.0] * len(self.axes)

    def alone(self, number: int, place: int) -> float:
        """How much one axis' cut raises the loss on its own."""
        if place == 0:
            return 0.0
        axis = self.axes[number]
        return _on_curve(self._curves[number], axis.removed(axis.sizes[place - 1]))

    def of(self, place: Place) -> float:
        """The guess for all of them together."""
        return sum(self.weights[n] * self.alone(n, each) for n, each in enumerate(place))

    def learn(self, place: Place, rise: float) -> None:
        """Correct the prices by what a plan cost in fact."""
        parts = [self.weights[n] * self.alone(n, each) for n, each in enumerate(place)]
        guess = sum(parts)
        if guess <= 0.0:
            return
        ratio = min(max(rise / guess, 1 / _MOST_BLAME), _MOST_BLAME)
        for n, part in enumerate(parts):
            self.weights[n] *= ratio ** (part / guess)


def _rising(axis: Axis, points: Mapping[int, float]) -> list[tuple[float, float]]:
    """Shares and losses, from nothing on; a deeper cut is never taken to cost less than a shallower one."""
    curve = [(0.0, 0.0)]
    for size in sorted(points, reverse=True):
        curve.append((axis.removed(size), max(points[size], curve[-1][1])))
    return curve


def _on_curve(curve: Sequence[tuple[float, float]], share: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(curve):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / max(x1 - x0, 1e-12)
    if len(curve) < 2:
        return 0.0
    (x0, y0), (x1, y1) = curve[-2:]
    return y1 + _BEYOND * max(y1 - y0, 1e-9) / max(x1 - x0, 1e-12) * (share - x1)


class Search:
    """The search for places within a limit.

    Args:
        cost: what a place takes; None where its sizes cannot be had together.
        limit: what it may take.
    """

    def __init__(self, prices: Prices, cost: Callable[[Place], float | None], limit: float) -> None:
        self.prices, self.limit = prices, limit
        self._ask = cost
        self._costs: dict[Place, float | None] = {}

    def cost(self, place: Place) -> float | None:
        """What a place takes, computed once."""
        if place not in self._costs:
            self._costs[place] = self._ask(place)
        return self._costs[place]

    def fits(self, place: Place) -> bool:
        """Whether a place can be had and is within the limit."""
        found = self.cost(place)
        return found is not None and found <= self.limit

    def best(self) -> list[Place]:
        """Places within the limit, those with the lowest guess first: where the search passed, and around its ends."""
        passed: set[Place] = set()
        for start in self._starts():
            place = start
            passed.add(place)
            for _ in range(_MOST_MOVES):
                better = min(self._moves(place), key=self._rank, default=place)
                if self._rank(better) >= self._rank(place):
                    break
                place = better
                passed.add(place)
            passed.update(self._moves(place))
        return sorted(passed, key=self._rank)

    def _rank(self, place: Place) -> tuple[float, float, Place]:
        found = self.cost(place)
        return round(self.prices.of(place), 12), -(found or 0.0), place

    def _starts(self) -> Iterator[Place]:
        axes = self.prices.axes
        for number, axis in enumerate(axes):
            for each in range(1, len(axis.sizes) + 1):
                place = _with((0,) * len(axes), number, each)
                if self.fits(place):
                    yield place
                    break
        greedy = self._cheapest_first()
        if greedy is not None:
            yield greedy

    def _cheapest_first(self) -> Place | None:
        """Cut, again and again, where the least loss is paid for what is saved."""
        place: Place = (0,) * len(self.prices.axes)
        while not self.fits(place):
            now, at = self.prices.of(place), self.cost(place)
            assert at is not None
            found: tuple[float, Place] | None = None
            for number, axis in enumerate(self.prices.axes):
                for each in range(place[number] + 1, len(axis.sizes) + 1):
                    cut = _with(place, number, each)
                    then = self.cost(cut)
                    if then is None or then >= at:
                        continue
                    price = (self.prices.of(cut) - now) / (at - max(then, self.limit))
                    if found is None or (price, cut) < found:
                        found = (price, cut)
            if found is None:
                return None
            place = found[1]
        return place

    def _moves(self, place: Place) -> Iterator[Place]:
        """Less of a cut in one axis, alone or paid for by the smallest cut in another that is enough."""
        for number, at in enumerate(place):
            for less in range(at):
                eased = _with(place, number, less)
                if self.fits(eased):
                    yield eased
                    continue
                yield from self._paid(eased, number)

    def _paid(self, eased: Place, number: int) -> Iterator[Place]:
        for other, axis in enumerate(self.prices.axes):
            if other == number:
                continue
            low, high = eased[other], len(axis.sizes)
            while high - low > 1:  # the shallowest cut that is enough; a deeper one always saves more
                middle = (low + high) // 2
                low, high = (low, middle) if self.fits(_with(eased, other, middle)) else (middle, high)
            if high > eased[other] and self.fits(_with(eased, other, high)):
                yield _with(eased, other, high)


def _with(place: Place, number: int, value: int) -> Place:
    return (*place[:number], value, *place[number + 1 :])
