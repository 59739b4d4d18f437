"""A new process: from its start to the first token, and what memory that takes.

Cold is the first process on a machine: nothing kept by an earlier one (compiled steps above all; each contestant's
caches are in a folder, and this one is empty), and the weights not in the page cache. Warm is a process on a machine
where the model has run before: with the caches that the measured worker left, and the weights in memory. The
libraries' own files are in the page cache both times. The clock runs in the parent, so starting Python and importing
the library count, as they do for whoever waits.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.generation.pool import Worker
from benchmarks.generation.rounds import SEED, Figures, Sizes
from benchmarks.generation.shapes import Shape

WARM_STARTS = 3


def first_tokens(
    start: Callable[[Path | None], Worker], shape: Shape, folder: Path, sizes: Sizes, found: Figures
) -> None:
    """Fill in the seconds to the first token, cold and warm (the median of some starts), and the peak of memory.

    Args:
        start: starts the contestant's process, with its caches in a folder, or in its own where None.
        folder: the contestant's; its files are taken out of the page cache.
    """
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        _forget(folder / "files")
        found.first_token["cold"], _ = _start(start, Path(empty), shape, sizes)
    starts = [_start(start, None, shape, sizes) for _ in range(WARM_STARTS)]
    found.first_token["warm"] = statistics.median(seconds for seconds, _ in starts)
    found.peak_bytes["first token"] = int(statistics.median(peak for _, peak in starts))


def _start(
    start: Callable[[Path | None], Worker], caches: Path | None, shape: Shape, sizes: Sizes
) -> tuple[float, int]:
    began = time.perf_counter()
    with start(caches) as worker:
        rows = shape.prompts(1, sizes.prompt, SEED)
        if shape.kind == "encoder":
            worker.ask("encode", rows=rows)
        else:
            worker.ask("generate", prompts=rows, new=1)
        return time.perf_counter() - began, worker.ask("memory")["peak"]


def _forget(files: Path) -> None:
    """Take the files' pages out of the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    resolved = files.resolve()
    for path in [resolved, *resolved.rglob("*")]:
        if path.is_file():
            opened = os.open(path, os.O_RDONLY)
            try:
                os.fsync(opened)  # only pages that are on the disk can be dropped
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(opened)
