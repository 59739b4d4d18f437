"""How Lathe's figures stand to what it set out to reach: each aim with the number wanted and the number found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.generation.rounds import Figures


@dataclass(frozen=True)
class Aim:
    """One aim.

    Args:
        name: what is compared.
        wanted: the least number that reaches it.
        found: the number; None where one of the two sides was not measured.
    """

    name: str
    wanted: float
    found: float | None

    @property
    def line(self) -> str:
        """A row of a Markdown table."""
        if self.found is None:
            return f"| {self.name} | {self.wanted:g} | not measured | |"
        return f"| {self.name} | {self.wanted:g} | {self.found:.2f} | {self.word} |"

    @property
    def word(self) -> str:
        """Whether it is reached."""
        return "reached" if self.found is not None and self.found >= self.wanted else "missed"


def aims(rows: Iterable[Figures]) -> list[Aim]:
    """Every aim for one shape that decodes, from its contestants' medians."""
    found = [row for row in rows if not row.reason]

    def best(task: str, wanted: Callable[[Figures], bool]) -> float | None:
        return max((row.medians[task] for row in found if task in row.medians and wanted(row)), default=None)

    def ours(task: str, bits: int | None = None) -> float | None:
        return best(task, lambda row: row.ours and bits in (None, row.bits))

    def peers(task: str, name: str = "") -> float | None:
        return best(task, lambda row: not row.ours and row.name.startswith(name))

    share = max((row.share for row in found if row.ours and row.bits == 8 and row.share is not None), default=None)
    plain = best("decode-1", lambda row: row.name == "transformers")
    tasks = dict.fromkeys(task for row in found for task in row.medians if task != "decode-1")
    return [
        Aim("batch 1 / CTranslate2's best", 3, _over(ours("decode-1"), peers("decode-1", "CTranslate2"))),
        Aim("batch 1, int8 / llama.cpp Q8_0", 1.5, _over(ours("decode-1", 8), peers("decode-1", "llama.cpp Q8_0"))),
        Aim("batch 1, int4 / llama.cpp Q4_0", 1.5, _over(ours("decode-1", 4), peers("decode-1", "llama.cpp Q4_0"))),
        Aim("batch 1 / transformers", 8, _over(ours("decode-1"), plain)),
        Aim("batch 1, int8, share of the bandwidth limit", 0.6, share),
        *[Aim(f"{task} / the best peer of any width", 1, _over(ours(task), peers(task))) for task in tasks],
    ]


def _over(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def aims_table(rows: Iterable[Figures]) -> list[str]:
    """The aims as lines of Markdown."""
    return ["", "| aim | wanted | found | |", "|---|---:|---:|---|", *[aim.line for aim in aims(rows)]]
