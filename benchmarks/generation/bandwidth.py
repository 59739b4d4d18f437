"""The machine's read bandwidth past its caches, by as many threads as the contestants have.

Decoding one row reads every weight once a step, so bytes over bandwidth is the least time that a step can take.
A small C program measures it (`read_bandwidth.c` says how); the best pass counts, since it is a limit that is
looked for. Where there is no C compiler, PyTorch's sum over a large tensor stands in: it reads with one stream a
thread and stays below the limit, so the shares printed come out too high, and the table says so.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "read_bandwidth.c"
MIB_A_THREAD = 256  # some seven times the largest cache of a desktop processor


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, and how that was found."""

    bytes_per_second: float
    how: str


def read_bandwidth(threads: int, folder: Path, passes: int = 8, mib: int = MIB_A_THREAD) -> Bandwidth:
    """Measure it over so many MiB a thread; `folder` keeps the program."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return _by_program(compiler, threads, folder, passes, mib) if compiler else by_torch(threads, passes, mib)


def _by_program(compiler: str, threads: int, folder: Path, passes: int, mib: int) -> Bandwidth:
    program = folder / "read_bandwidth"
    if not program.exists():
        flags = ["-O3", "-march=native", "-pthread"]
        subprocess.run([compiler, *flags, "-o", str(program), str(SOURCE)], check=True)
    asked = [str(program), str(threads), str(mib), str(passes)]
    lines = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found = {int(streams): float(rate) for streams, rate in (line.split() for line in lines)}
    best = max(found, key=lambda streams: found[streams])
    return Bandwidth(found[best], f"C, {threads} threads of {best} streams, best of {passes} passes")


def by_torch(threads: int, passes: int, mib: int) -> Bandwidth:
    """What stands in where there is no C compiler."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(threads * mib * 2**20 // 4)
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return Bandwidth(buffer.nbytes / min(seconds), f"torch.sum by {threads} threads (no C compiler: below the limit)")
