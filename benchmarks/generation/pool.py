"""The parent's side of a worker: start it, ask it, and keep it still while others are measured.

A worker stays alive from its first turn to its last, with its model loaded and its caches warm. Between its turns
the kernel holds the process and what it started (SIGSTOP): whatever its threads would do while they wait, spin or
sleep, they do nothing. So nobody's wait policy has to be changed to keep the others' cores free, and each library
runs as it comes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.generation.base import Unfit
from benchmarks.generation.rows import Row

ROOT = Path(__file__).parent.parent.parent


class Broken(Exception):
    """A worker ended where it should have answered."""


class Worker:
    """One contestant's process.

    Args:
        row: who.
        kind: what kind of model.
        model: its stock directory.
        folder: for this contestant's files, its caches and its log.
        threads: how many it may use.
        python: the interpreter of its environment.
        caches: what the process keeps between runs goes in here; by default in `folder`, as warm as it was left.
    """

    def __init__(
        self, row: Row, kind: str, model: Path, folder: Path, threads: int, python: str, caches: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.row, self.log = row, folder / "log"
        module = f"benchmarks.generation.by_{row.module}"
        words = [module, kind, str(threads), json.dumps(row.options), str(model), str(folder / "files")]
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.generation.worker", *words],
                cwd=ROOT,
                env=_environment(threads, caches or folder / "caches"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # a group of its own, so that a compiler it has started is held with it
            )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, do: str, **words: Any) -> dict[str, Any]:
        """One task's answer; the worker runs for as long as that takes.

        Raises:
            Unfit: the contestant says that it cannot.
            Broken: the worker ended; the message is the last line of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._send(signal.SIGCONT)
            self._process.stdin.write(json.dumps({"do": do, **words}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((each.strip() for each in reversed(lines) if each.strip()), "nothing is in its log")
            raise Broken(f"ended with code {code}: {last[:160]}")
        self._hold()
        answer: dict[str, Any] = json.loads(line)
        if "unfit" in answer:
            raise Unfit(answer["unfit"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._send(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _hold(self) -> None:
        """Stop the process, and wait until it stands still."""
        if self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGSTOP)
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _environment(threads: int, caches: Path) -> dict[str, str]:
    """The process's own: so many threads in every library, no network, and caches in one folder."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **dict.fromkeys(counts, str(threads)),
        "PYTHONPATH": os.pathsep.join(paths),
        "XDG_CACHE_HOME": str(caches),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
