"""The process that one contestant lives in: reads tasks as lines of JSON, answers each with a line of JSON.

    python -m benchmarks.generation.worker MODULE KIND THREADS OPTIONS MODEL FILES

MODULE is the contestant's (`benchmarks.generation.by_…`), MODEL the stock directory and FILES what the contestant
makes of it. A library may print to stdout what it likes: it is led to stderr, and the answers go where stdout was.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.base import Runner, Unfit

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def main() -> None:
    """Serve until the parent closes the pipe."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    contestant = _Contestant(*sys.argv[1:])
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(contestant, asked.pop("do"))(**asked)
        except Unfit as reason:
            answer = {"unfit": str(reason)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Contestant:
    """What can be asked for; the model is loaded by the first task that needs it."""

    def __init__(self, module: str, kind: str, threads: str, options: str, model: str, files: str) -> None:
        self.module, self.kind, self.threads = module, kind, int(threads)
        self.options: dict[str, str] = json.loads(options)
        self.model, self.files = Path(model), Path(files)
        self._loaded: Runner | None = None

    @property
    def runner(self) -> Runner:
        if self._loaded is None:
            made: Runner = self._own().Runner(self.files, self.kind, self.threads, **self.options)
            self._loaded = made
        return self._loaded

    def prepare(self) -> dict[str, Any]:
        """Convert the stock directory, where there is something to convert; the library's version."""
        own = self._own()
        version = own.version()
        if not self.files.exists():
            unfinished = self.files.with_name("unfinished")
            if unfinished.is_dir() and not unfinished.is_symlink():
                shutil.rmtree(unfinished)
            unfinished.unlink(missing_ok=True)
            own.prepare(self.model, unfinished, self.kind, **self.options)
            unfinished.rename(self.files)
        return {"version": version}

    def generate(self, prompts: list[list[int]], new: int, repeats: int = 1) -> dict[str, Any]:
        """Generate `repeats` times over: the seconds of each, and the tokens."""
        seconds, tokens = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            tokens = self.runner.generate(prompts, new)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "tokens": tokens}

    def encode(self, rows: list[list[int]], repeats: int = 1) -> dict[str, Any]:
        """Encode `repeats` times over: the seconds of each."""
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.runner.encode(rows)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}

    def score(self, prompt: list[int], target: list[int], into: str) -> dict[str, Any]:
        """Write what the model says of a text to the file `into`: `Runner.score`, or an encoder's vectors."""
        encoder = self.kind == "encoder"
        found = {"hidden": self.runner.encode([prompt])} if encoder else self.runner.score(prompt, target)
        np.savez(into, **found)  # type: ignore[arg-type]  # the stub takes the names for its own options
        return {}

    def step_bytes(self) -> dict[str, Any]:
        """The bytes of weights that a step reads, from a contestant that counts them; else None."""
        return {"step_bytes": getattr(self.runner, "step_bytes", None) or None}

    def memory(self) -> dict[str, Any]:
        """The most memory that this process has had resident, in bytes."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return {"peak": int(peak.split()[1]) * 1024}

    def _own(self) -> Any:
        """The contestant's module."""
        return importlib.import_module(self.module)


def _die_with_parent() -> None:
    # A worker that waits its turn is stopped, so it would not notice that the pipe is closed.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
