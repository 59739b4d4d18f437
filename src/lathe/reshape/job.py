"""A resize with everything that it names opened, and how it tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from lathe.architecture import Architecture
from lathe.reshape.calibrate import Batch
from lathe.reshape.recipe import Recipe, Written, digest_of_batches, machine
from lathe.reshape.request import ResizeRequest
from lathe.reshape.resize import planned
from lathe.reshape.source import Source
from lathe.reshape.stream import StreamedTransformer
from lathe.reshape.text import Documents
from lathe.reshape.vocabulary import Vocabulary

Advance = Callable[[int, str], None]


class Reporter(Protocol):
    """How a job tells what it is doing."""

    def say(self, line: str) -> None:
        """One line about what is being done."""
        ...

    def work(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show work of `total` units; the function yielded is told how many are done."""
        ...


class Silent:
    """A reporter that says nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def work(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Nothing."""
        return nullcontext(lambda done, note: None)


@dataclass(frozen=True)
class Job:
    """A request with everything that it names opened and checked.

    Args:
        source_sha256: None for a source in memory that no files hold.
        stages: what is done, in order: `{"resize": changes}` and `{"heal": settings}`.
        fitted: the text that the cut is fitted on.
        held: the text that it is measured on.
        apart: what was kept apart of the text to fit on.
        expected: a recipe that this is a replay of.
        budget: how the sizes were found, where a budget was given; see `lathe.reshape.budget_job`.
        vocabulary: what the new vocabulary shall hold; the first stage makes it.
        used: the text of a file that it is made from.
        batches: the text to fit on where it was given as token ids.
        parent: the recipe by which a source in memory was made.
        rows: why rows of text are shorter than the model has room for.
        why_streamed: the line to tell where the job streams without having been asked to.
    """

    request: ResizeRequest
    source: Source
    source_sha256: str | None
    stages: tuple[Mapping[str, Any], ...]
    fitted: Documents | None = None
    held: Documents | None = None
    apart: Documents | None = None
    expected: Written | None = None
    budget: Mapping[str, Any] | None = None
    vocabulary: Vocabulary | None = None
    used: Documents | None = None
    batches: Sequence[Batch] = ()
    parent: Recipe | None = None
    rows: str = ""
    why_streamed: str = ""

    @property
    def is_streamed(self) -> bool:
        """Whether one layer is held at a time."""
        return isinstance(self.source.model, StreamedTransformer)

    @property
    def divides(self) -> bool:
        """Whether a tenth of the text to fit on is kept apart: without another to measure on; in a replay, as then."""
        before = (self.expected.recipe.calibrate or {}) if self.expected is not None else {}
        return bool(before.get("apart", self.request.data is None))

    @property
    def target(self) -> Architecture:
        """The architecture in the end."""
        return walked(self.source.model.architecture, self.stages, self.request)

    @property
    def shown_changes(self) -> dict[str, Any]:
        """What was asked for, as a reader of the report is told."""
        shown, asked = dict(self.request.changes), self.request.vocabulary
        if asked is not None and asked.file is not None:
            shown["vocabulary"] = asked.file
        if self.vocabulary is not None:
            shown |= self.vocabulary.told
        return shown | ({} if self.request.remainder is None else {"remainder": self.request.remainder})


def walked(source: Architecture, stages: tuple[Mapping[str, Any], ...], request: ResizeRequest) -> Architecture:
    """The architecture that stages lead to."""
    for stage in stages:
        if "resize" in stage:
            renews = request.vocabulary is not None and stage is stages[0]
            source, _ = planned(source, stage["resize"], **request.how, own_form=request.own_form, renews=renews)
    return source


def recipe_of(job: Job) -> Recipe:
    """The recipe as far as it is known before the work; the job's run fills in what each stage did."""
    request, calibrate, vocabulary = job.request, None, None
    if request.calibrate is not None and job.fitted is not None:
        calibrate = {**request.calibrate.to_dict(), **job.fitted.known, "apart": job.divides}
    elif job.batches:
        calibrate = {"batches": len(job.batches), "sha256": digest_of_batches(job.batches)}
    if job.vocabulary is not None:
        vocabulary = job.vocabulary.told if request.vocabulary is None else request.vocabulary.to_dict()
        vocabulary |= {} if job.used is None else job.used.known
    source: dict[str, Any] = {"model": request.source, "sha256": job.source_sha256}
    if job.parent is not None:
        source["recipe"] = job.parent.to_dict()
    return Recipe(
        source=source,
        stages=[],
        how=request.how,
        seed=request.seed,
        objective=request.objective,
        calibrate=calibrate,
        vocabulary=vocabulary,
        remainder=request.remainder,
        budget=None if job.budget is None else dict(job.budget),
        made_with=machine(),
        obstacle=_obstacle(job),
    )


def _obstacle(job: Job) -> str:
    """Why a recipe could not be done again from files; empty where it could."""
    if job.source_sha256 is None:
        return "its source was a model in memory that no files hold"
    if job.batches:
        return "it was fitted on token ids that no file holds"
    if job.vocabulary is not None and job.request.vocabulary is None:
        return "its vocabulary was given from Python, and no file holds that"
    return ""
