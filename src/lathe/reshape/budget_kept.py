"""A budget's plan on the disk, beside the healing that follows it.

The trials take minutes, and what they measure in milliseconds comes out otherwise on another day. A healing that was
killed has to go on with the sizes that it began with. So its plan is kept where its run is, with a digest of all that
the sizes follow from, and is taken again where that is the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lathe.checkpoint.atomic import atomic_file
from lathe.reshape.budget_plan import BudgetPlan
from lathe.reshape.job import Job

PLAN = "budget-plan.json"
_RUNS = "stage-*"  # what healings leave in the same folder
# Of a request: where files lie, how it is carried out, and what comes after the sizes are found.
_WITHOUT = ("source", "calibrate", "data", "heal", "stream")


def kept_plan(job: Job, folder: Path) -> BudgetPlan | None:
    """The plan that `folder` keeps for the same model, texts and budget; None where it keeps none for them."""
    file = folder.expanduser() / PLAN
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return BudgetPlan.from_dict(held["plan"]) if held["asked"] == _asked(job) else None
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def keep(job: Job, plan: BudgetPlan, folder: Path) -> None:
    """Write a plan into `folder`, which is made where it is missing; not over that of a healing that was begun there.

    Raises:
        RequestError: the folder cannot be written to.
        LatheError: the disk is full.
    """
    folder = folder.expanduser()
    if next(folder.glob(_RUNS), None) is not None:
        return
    with atomic_file(folder / PLAN, replace=True) as file:
        file.write_text(json.dumps({"asked": _asked(job), "plan": plan.to_dict()}, indent=2) + "\n", encoding="utf-8")


def _asked(job: Job) -> str:
    """The SHA-256 of all that the sizes follow from, wherever the files lie by now."""
    request: dict[str, Any] = {key: value for key, value in job.request.to_dict().items() if key not in _WITHOUT}
    texts = {"fitted": job.fitted, "held": job.held}
    asked = {
        **request,
        "source": job.source_sha256,
        **{name: None if documents is None else documents.digest for name, documents in texts.items()},
        **{
            name: None if settings is None else {**settings.to_dict(), "file": ""}
            for name, settings in (("calibrate", job.request.calibrate), ("data", job.request.data))
        },
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
