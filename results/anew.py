"""From nothing at other sizes: what cuts are measured beside.

Each training has the settings of the parent's run and is a run of its own, which goes on where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parent import Parent, asked

import lathe
from lathe.train.job import open_job
from lathe.train.request import RunSettings, read_request

Sizes = Mapping[str, Any]


def perplexity_anew(
    parent: Parent, sizes: Sizes, tokens: int, out: Path, key: str, *, precision: str | None = None
) -> float:
    """Of a model that was trained on so many tokens; on the whole budget after whatever came before the parent's run.

    Its runs are kept in `out` under `key`.

    Args:
        precision: of the matrix products; where left out, the parent's.
    """
    first, start = _first_run(parent.request), None
    how = {} if precision is None else {"precision": precision}
    if first is not None and tokens == parent.tokens:
        start = _trained(first, sizes, first.tokens, out / f"{key}-first", None, how)
    elif first is not None:
        start, blank = out / f"{key}-start", parent.model.architecture.with_(sizes)
        if not start.exists():
            lathe.Model(blank, seed=0, tokenizer=parent.model.tokenizer).save(start)
    folder = out / f"{key}-new-{tokens}"
    return parent.perplexity(lathe.load(_trained(parent.request, sizes, tokens, folder, start, how)))


def _first_run(request: RunSettings) -> RunSettings | None:
    """What the run was asked from whose checkpoint a run began; None where it began from nothing."""
    asked_before = Path(request.model).parent.parent / "run.json"
    if not asked_before.is_file():
        return None
    return read_request(json.loads(asked_before.read_text(encoding="utf-8")), {})


def _trained(
    request: RunSettings, sizes: Sizes, tokens: int | None, folder: Path, start: Path | None, how: Mapping[str, Any]
) -> Path:
    """The last checkpoint of a run at other sizes, from `start` or from nothing."""
    changes: dict[str, Any] = {"tokens": tokens, "evaluate_every": None, **how}
    if tokens is not None:  # a short run rises as early in its time
        steps = tokens // ((request.data.rows or 1) * request.data.length)
        changes["schedule.warmup"] = min(request.schedule.warmup, steps // 10)
    made = {f"architecture.{name}": size for name, size in sizes.items()}
    changes |= made if start is None else {"model": str(start)}
    open_job(asked(request, out=str(folder), **changes)).run(resume=folder.exists())
    return folder / "checkpoints/last"
