"""A budget where it is asked for: in a resize job, or of a model that is at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lathe.checkpoint.atomic import scratch_directory
from lathe.checkpoint.tensors import DEFAULT_SHARD_BYTES
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.planner.quantities import bytes_text
from lathe.reshape.budget import plan_budget
from lathe.reshape.budget_cost import BudgetSettings
from lathe.reshape.budget_plan import BudgetPlan
from lathe.reshape.budget_trial import RowsProbe, TextProbe
from lathe.reshape.calibrate import Batch
from lathe.reshape.carry_out import shard_bytes
from lathe.reshape.job import Job
from lathe.reshape.kept import keep_plan, kept_plan
from lathe.reshape.measure import weight_bytes
from lathe.reshape.opening import with_sizes
from lathe.reshape.resize import check_how
from lathe.reshape.row_length import best_length
from lathe.reshape.run import through
from lathe.reshape.stream import StreamedTransformer
from lathe.reshape.text import TextSettings, read_documents
from lathe.reshape.vocabulary import settings_ids
from lathe.text.tokenizer import Tokenizer
from lathe.train.machine import pick_device

log = logging.getLogger("lathe")


def spend(
    job: Job, say: Callable[[str], None] = log.info, *, beside: Path | None = None, kept: Path | None = None
) -> tuple[Job, BudgetPlan]:
    """Find the sizes of a job that was given a budget; the job that comes back has them, and can be run.

    Args:
        say: told a line about each trial.
        beside: where the result will go; a streamed job's trials put their tensors aside next to it.
        kept: a folder that keeps the plan. What was planned there for the same model, texts and budget is taken as it
            is: a healing that was killed goes on with the sizes that it began with, however the machine times today.

    Raises:
        RequestError: no budget, no text to measure on, a budget that cannot be met (says the least possible), or a
            healing in `kept` that began otherwise.
        LatheError: the disk is full.
    """
    if job.request.budget is None:
        raise RequestError("no budget: give max_parameters, max_bytes or max_latency")
    _require_larger(job)
    if job.why_streamed:
        say(job.why_streamed)
    plan = None if kept is None else kept_plan(job, kept)
    if plan is not None:
        say(f"the plan is the one in {kept}, made for the same model, texts and budget: {plan.written}")
    else:
        plan = _planned(job, say, beside)
        if kept is not None:
            keep_plan(job, plan, kept)
    return with_sizes(job, plan.changes, plan.to_dict()), plan


def _require_larger(job: Job) -> None:
    """Refuse a limit on bytes that the files meet as they are: read as one wide type, the model may take more."""
    limit, directory = None if job.request.budget is None else job.request.budget.bytes, job.source.directory
    if limit is not None and directory is not None and not job.request.changes and weight_bytes(directory) <= limit:
        raise RequestError(
            f"max_bytes={bytes_text(limit)}: the model's files have {bytes_text(weight_bytes(directory))}, which is "
            "within it: nothing to cut; ask for less, or leave the budget out"
        )


def _planned(job: Job, say: Callable[[str], None], beside: Path | None) -> BudgetPlan:
    request, source = job.request, job.source
    assert request.budget is not None
    if isinstance(source.model, StreamedTransformer) and source.model.tensors.folder is None:
        with scratch_directory(Path("trials") if beside is None else beside) as folder:
            return _planned(through(job, folder), say, beside)
    if source.tokenizer is None or job.fitted is None or job.held is None or request.calibrate is None:
        raise RequestError("a budget needs text to fit on and text to measure on: give a longer --calibrate FILE")
    probe = TextProbe(
        source.model,
        source.tokenizer,
        job.fitted,
        job.held,
        request.calibrate,
        request.data or request.calibrate,
        tokens=request.budget.tokens,
        objective=request.objective,
    )
    return plan_budget(
        source.model,
        probe,
        request.budget,
        tokenizer=source.tokenizer,
        fixed=request.changes,
        how=request.how,
        seed=request.seed,
        own_form=request.own_form,
        reserved=frozenset(settings_ids(source.generation) | settings_ids(source.config)),
        device=pick_device(request.device),
        shard_bytes=DEFAULT_SHARD_BYTES if source.directory is None else shard_bytes(source.directory),
        say=say,
    )


def plan_for(
    model: Transformer,
    settings: BudgetSettings,
    calibrate: str | Sequence[Batch],
    *,
    tokenizer: Tokenizer | None,
    fixed: Mapping[str, Any],
    how: Mapping[str, Any],
    seed: int,
    own_form: bool,
    reserved: frozenset[int],
) -> BudgetPlan:
    """The plan of a model at hand.

    Args:
        calibrate: a file, of which a tenth is kept apart to measure on; or batches, of whose rows that is done. With
            batches the vocabulary is not cut: there is no text to show to another tokenizer.

    Raises:
        RequestError: no text, a file without a tokenizer to read it, words on how a width is cut that exclude each
            other, or a budget that cannot be met.
    """
    check_how(how["method"], how["search"], how["refit"])
    probe: TextProbe | RowsProbe
    if isinstance(calibrate, str):
        if tokenizer is None:
            raise RequestError(f"the model has no tokenizer to read {calibrate} with; give batches of ids")
        text = TextSettings(file=calibrate, seed=seed)
        fitted, held = read_documents(text, tokenizer, apart=True)
        if not held:
            raise RequestError(f"{calibrate} is too short to fit on it and to measure on it; give more text")
        text = replace(text, length=best_length(model, fitted, text, tokenizer).positions)
        probe = TextProbe(model, tokenizer, fitted, held, text, text, tokens=settings.tokens)
    else:
        probe = RowsProbe(model, calibrate)
    return plan_budget(
        model,
        probe,
        settings,
        tokenizer=tokenizer,
        fixed=fixed,
        how=how,
        seed=seed,
        own_form=own_form,
        reserved=reserved,
    )
