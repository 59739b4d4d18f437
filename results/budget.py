"""Half of a model's parameters: the budget's plan beside the best that any single axis does.

    python results/budget.py MODEL --calibrate TEXT --data HELD-OUT [--keep 0.5] [budget.effort=2 …]

Every loss is of a model that was cut for real and measured on the held-out text, in nats for each token of the
source's tokenizer. Two tables come out, as Markdown: what every single axis comes to that can meet the budget alone,
with the plan below them, and the plan axis by axis. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lathe.cli.settings import parse_settings
from lathe.reshape.budget_job import spend
from lathe.reshape.budget_table import ALONE, PLAN, alone_cells, plan_cells, sentences
from lathe.reshape.measure import parameters_of
from lathe.reshape.opening import open_job
from lathe.reshape.request import read_request
from lathe.reshape.source import open_source


def main() -> None:
    """Plan the budget and print the tables."""
    words = argparse.ArgumentParser(description="A budget's plan beside every single axis.")
    words.add_argument("model")
    words.add_argument("--calibrate", required=True)
    words.add_argument("--data", required=True)
    words.add_argument("--keep", type=float, default=0.5, help="the share of the parameters that stays")
    words.add_argument("settings", nargs="*", help="words as lathe resize takes them")
    given = words.parse_intermixed_args()
    limit = int(given.keep * parameters_of(open_source(given.model).model))
    settings = {**parse_settings(given.settings), "calibrate": given.calibrate, "data": given.data}
    job = open_job(read_request(given.model, {**settings, "max_parameters": limit}))
    _, plan = spend(job, lambda line: print(line, file=sys.stderr, flush=True))
    values = plan.to_dict()
    table(ALONE, alone_cells(values))
    print()
    table(PLAN, plan_cells(values))
    print()
    for line in sentences(values):
        print(f"- {line}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table as Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
