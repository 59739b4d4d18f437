"""From a model's directory to another one of other sizes: what `lathe resize` does.

    run_job(open_job(read_request("my-t5", {"d_model": 384, "calibrate": "text.txt"})), Path("my-t5-384"), pages=…)

Open the source and the text, cut (in two stages where more than half goes and the model heals), measure after every
operation, write, open what was written once more, and write down how it was done and what it cost. All of it happens
in a temporary directory that becomes DST at the end, so DST is whole or not there.

Pages are made by whoever calls, from the `Outcome`: this package draws nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from lathe.blueprint import stored
from lathe.checkpoint.atomic import atomic_directory
from lathe.reshape.carry_out import carry_out
from lathe.reshape.job import Job, Reporter, Silent
from lathe.reshape.kept import PLAN, REQUEST, require_same_request
from lathe.reshape.outcome import Outcome
from lathe.reshape.recipe import Recipe
from lathe.reshape.spill import Tensors
from lathe.reshape.stream import StreamedTransformer, weights_of

Pages = Callable[[Outcome, Recipe], Mapping[str, str]]


def run_job(
    job: Job, directory: Path, *, pages: Pages, run: Path | None = None, reporter: Reporter | None = None
) -> Outcome:
    """Do it, and write DST.

    Args:
        directory: where the result goes; it must not exist, or be empty.
        pages: makes the text files that describe the result, name to content.
        run: where healing keeps its checkpoints; where left out, in `directory` + `.heal`, from which they are removed
            at the end.

    Raises:
        RequestError: `directory` exists, text that is too short, or a healing in `run` that began otherwise.
        LatheError: the disk is full. Nothing is left at `directory`; what healing had reached stays in its run.
    """
    started = time.perf_counter()
    itemsize = torch.empty(0, dtype=job.source.model.dtype).element_size()
    nbytes = itemsize * sum(parameter.size for parameter in stored(job.target))
    if job.is_streamed:  # what operations make on the way is float64
        nbytes += 8 * sum(parameter.size for parameter in stored(job.source.model.architecture))
    kept = run or heal_folder(directory)
    if job.request.heal is not None:
        require_same_request(job, kept)
    reporter = reporter or Silent()
    if job.why_streamed:
        reporter.say(job.why_streamed)
    with atomic_directory(directory, nbytes=nbytes) as made:
        with _scratch(made / ".scratch") if job.is_streamed else nullcontext() as scratch:
            work = job if scratch is None else through(job, scratch)
            outcome, recipe = carry_out(work, made, kept, reporter, directory.name)
        outcome.seconds = time.perf_counter() - started
        for name, text in pages(outcome, recipe).items():
            (made / name).write_text(text, encoding="utf-8")
    if run is None:
        _remove_runs(kept, sum("heal" in stage for stage in job.stages))
    return outcome


def _remove_runs(folder: Path, number: int) -> None:
    """Remove what a job's healings kept, and the folder unless somebody else has put something there."""
    for stage in range(1, number + 1):
        shutil.rmtree(folder / f"stage-{stage}", ignore_errors=True)
    if number:
        for name in (PLAN, REQUEST):
            (folder / name).unlink(missing_ok=True)
    if number and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for what a streamed resize puts aside; it is gone before the result is published."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def through(job: Job, scratch: Path) -> Job:
    """The streamed job with a model whose operations put their tensors into `scratch`."""
    old = job.source.model
    model = StreamedTransformer(old.architecture, Tensors.of(weights_of(old), scratch))
    return replace(job, source=replace(job.source, model=model))


def heal_folder(directory: Path) -> Path:
    """Where healing keeps its run until the result is written."""
    whole = directory.expanduser().resolve()
    return whole.with_name(f"{whole.name}.heal")
