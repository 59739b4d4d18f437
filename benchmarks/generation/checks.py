"""Whether everyone computes the same model, before anyone is timed.

In float32 the greedy tokens of all contestants must be those of `transformers`, token by token. Everyone's error is
taken on one fixed text of random tokens, as a share: the root mean square difference from `transformers`' float32,
over the spread (standard deviation) of those numbers. The numbers are the logits of every token of the text where a
contestant shows them, an encoder's hidden states, and the log-probabilities of the text's own tokens, which are all
that CTranslate2 shows of an encoder-decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.generation.base import Ids, Unfit
from benchmarks.generation.pool import Broken, Worker
from benchmarks.generation.rounds import Figures, Sizes
from benchmarks.generation.shapes import Shape

REFERENCE = "transformers"
ROWS, TARGET = 3, 48
SEED = 5


@dataclass(frozen=True)
class Agreement:
    """Which float32 contestants' greedy tokens equal the reference's, and where the others leave it."""

    tokens: int
    equal: tuple[str, ...]
    different: dict[str, str]

    def line(self) -> str:
        """As it is printed."""
        said = f"float32 greedy tokens ({self.tokens}): equal in {', '.join(self.equal)}"
        return "; ".join([said, *(f"{name} {where}" for name, where in self.different.items())])


def same_tokens(shape: Shape, workers: dict[str, Worker], found: dict[str, Figures], sizes: Sizes) -> Agreement | None:
    """Hold the float32 contestants' tokens against the reference's; None where there is nothing to compare."""
    exact = [name for name in workers if found[name].bits == 32 and not found[name].reason]
    if shape.kind == "encoder" or REFERENCE not in exact:
        return None
    prompts = shape.prompts(ROWS, sizes.prompt, SEED)
    tokens: dict[str, Ids] = {}
    for name in exact:
        try:
            tokens[name] = workers[name].ask("generate", prompts=prompts, new=sizes.new)["tokens"]
        except (Unfit, Broken) as reason:
            found[name].gave_up(reason)
    expected = tokens.get(REFERENCE)
    if expected is None:
        return None
    places = {name: first_difference(expected, rows) for name, rows in tokens.items()}
    return Agreement(
        ROWS * sizes.new,
        tuple(name for name, place in places.items() if place is None),
        {name: place for name, place in places.items() if place is not None},
    )


def first_difference(expected: Ids, rows: Ids) -> str | None:
    """Where `rows` stops being `expected`, in words; None where it does not."""
    for row, (ours, theirs) in enumerate(zip(expected, rows)):
        if len(ours) != len(theirs):
            return f"gave {len(theirs)} tokens in row {row + 1}, not {len(ours)}"
        for at, (one, other) in enumerate(zip(ours, theirs)):
            if one != other:
                return f"leaves it in row {row + 1} at token {at + 1} ({other}, not {one})"
    return None


def errors(shape: Shape, workers: dict[str, Worker], found: dict[str, Figures], sizes: Sizes, folder: Path) -> None:
    """Fill in each contestant's error against the reference's float32."""
    text = shape.prompts(1, sizes.prompt + TARGET, SEED)[0]
    prompt, target = text[: sizes.prompt], text[sizes.prompt :]
    said: dict[str, dict[str, np.ndarray]] = {}
    for name, worker in workers.items():
        if found[name].reason:
            continue
        into = folder / f"{found[name].name}.npz"
        try:
            worker.ask("score", prompt=prompt, target=target, into=str(into))
        except Unfit:
            continue  # it shows nothing of what it computes
        except Broken as reason:
            found[name].gave_up(reason)
            continue
        with np.load(into) as kept:
            said[name] = {key: kept[key] for key in kept.files}
    reference = said.get(REFERENCE)
    if reference is None:
        return
    for name, own in said.items():
        for key, exact in reference.items():
            if key in own and name != REFERENCE:
                found[name].errors[key] = relative_error(own[key], exact)


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """The root mean square difference, over the spread of what is exact."""
    wanted = exact.astype(np.float64)
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())
