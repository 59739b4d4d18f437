"""What lies beside a healing on the disk: what was asked for, and a budget's plan.

A healing that was killed goes on when the same is asked again. Whether it is the same is seen from `request.json`,
before any work is done, and what differs is named.

A budget's trials take minutes, and what they measure in milliseconds comes out otherwise on another day. A healing that
was killed has to go on with the sizes that it began with. So its plan is kept where its run is, with a digest of all
that the sizes follow from, and is taken again where that is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lathe.checkpoint.atomic import atomic_file
from lathe.errors import RequestError
from lathe.reshape.budget_plan import BudgetPlan
from lathe.reshape.job import Job
from lathe.train.run import first_difference

REQUEST, PLAN = "request.json", "budget-plan.json"
_REMEDY = "give the same again to go on, say another --run, or remove that folder"
_RUNS = "stage-*/checkpoints/*"  # what healings leave in the same folder, once they are worth going on with
# Of a request: what is told without the place of its file, what a healing does not follow from, how it is carried out.
_WITHOUT = ("source", "calibrate", "vocabulary", "heal", "data", "stream", "device")
# Of a healing: where its text lies, and how it is carried out.
_FREE = ("file", "save_every", "precision")


def require_same_request(job: Job, folder: Path) -> None:
    """Refuse a folder that holds a healing which began with another request.

    Raises:
        RequestError: says what was another.
    """
    folder = folder.expanduser()
    if not _is_begun(folder):
        return
    try:
        then = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return  # an older release's; the run itself says what it was asked
    if not isinstance(then, dict):
        return
    now = _request(job)
    if now["budget"] is not None:  # the sizes are found later
        then = {**then, "changes": now["changes"]}
    found = first_difference(then, now)
    if found is not None:
        name, old, new = found
        raise RequestError(f"{folder} holds a healing that began with {name}={old}, and this one says {new}; {_REMEDY}")


def keep_request(job: Job, folder: Path) -> None:
    """Write what was asked into the folder of a healing, unless one has begun there.

    Raises:
        RequestError: the folder cannot be written to.
        LatheError: the disk is full.
    """
    _write(folder.expanduser(), REQUEST, _request(job))


def _request(job: Job) -> dict[str, Any]:
    """All that a healing follows from, as plain values that a reader can tell apart."""
    request = job.request.to_dict()
    healed = {key: value for key, value in (request["heal"] or {}).items() if key not in _FREE}
    calibrate = {key: value for key, value in (request["calibrate"] or {}).items() if key != "file"}
    vocabulary = {key: value for key, value in (request["vocabulary"] or {}).items() if key != "file"}
    texts = {"calibrate": job.fitted, "vocabulary": job.used}
    asked = {key: value for key, value in request.items() if key not in _WITHOUT}
    asked |= {"calibrate": calibrate, "vocabulary": vocabulary, "heal": healed, "source": job.source_sha256}
    asked["text"] = {name: None if documents is None else documents.digest for name, documents in texts.items()}
    plain: dict[str, Any] = json.loads(json.dumps(asked))
    return plain


def _is_begun(folder: Path) -> bool:
    return next(folder.glob(_RUNS), None) is not None


def _write(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    if _is_begun(folder):
        return
    with atomic_file(folder / name, replace=True) as file:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def kept_plan(job: Job, folder: Path) -> BudgetPlan | None:
    """The plan that `folder` keeps for the same model, texts and budget; None where it keeps none for them.

    Raises:
        RequestError: a healing has begun there with another plan.
    """
    folder = folder.expanduser()
    require_same_request(job, folder)
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # none, or not a plan's
        held = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if held["asked"] == _asked(job):
            return BudgetPlan.from_dict(held["plan"])
    if _is_begun(folder):
        raise RequestError(
            f"{folder} holds a healing whose sizes were found for another request: other sizes beside the budget, or "
            f"other text to measure on; {_REMEDY}"
        )
    return None


def keep_plan(job: Job, plan: BudgetPlan, folder: Path) -> None:
    """Write a plan into `folder`, which is made where it is missing; not over that of a healing that was begun there.

    Raises:
        RequestError: the folder cannot be written to.
        LatheError: the disk is full.
    """
    _write(folder.expanduser(), PLAN, {"asked": _asked(job), "plan": plan.to_dict()})


def _asked(job: Job) -> str:
    """The SHA-256 of all that the sizes follow from: the request without its healing, and what is measured on where."""
    request, data = job.request, job.request.data
    asked = {key: value for key, value in _request(job).items() if key != "heal"}
    asked["data"] = None if data is None else {**data.to_dict(), "file": ""}
    asked |= {"held": None if job.held is None else job.held.digest, "device": request.device}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
