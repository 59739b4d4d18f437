"""What a run writes down, step by step: numbers that repeat, and times that do not.

`metrics.jsonl` holds a line for each step: loss, rate, gradient, tokens, which batch, and the evaluation if there
was one. Every number in it follows from the settings and the data, so a run that was killed and resumed leaves
the very file that an uninterrupted one leaves. What depends on the machine stands apart, in `speed.jsonl`.

A checkpoint notes how long both files were. Resuming cuts them back to that length: lines of steps that were
made after it will be written again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lathe.errors import LatheError
from lathe.train.evaluate import Evaluation
from lathe.train.loop import StepReport

log = logging.getLogger("lathe")

METRICS, SPEED = "metrics.jsonl", "speed.jsonl"


class Lines:
    """A file of JSON lines that is appended to.

    Args:
        length: how many bytes of it count; what comes after is cut off.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self._file = path.open("ab")
        if self._file.tell() < length:
            log.warning("%s is %d bytes shorter than at the checkpoint", path, length - self._file.tell())
        self._file.truncate(min(length, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; `LatheError` where the disk is full."""
        try:
            self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise LatheError(f"cannot write to {self.path}: {error.strerror}; free some space and resume") from error

    def sync(self) -> int:
        """Flush the file to the disk; its length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Board:
    """The same numbers for TensorBoard, in `folder`.

    Args:
        after: the step that is kept; what an earlier process wrote of later ones is marked as void.
    """

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, report: StepReport) -> None:
        """Add the step's numbers."""
        numbers = {"loss": report.loss, "lr": report.lr, "gradient norm": report.gradient_norm}
        if report.evaluation is not None:
            numbers["evaluation loss"] = report.evaluation.loss
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def metrics(report: StepReport) -> dict[str, Any]:
    """A step's line: only what repeats."""
    line: dict[str, Any] = {
        "step": report.step,
        "loss": report.loss,
        "lr": report.lr,
        "gradient_norm": report.gradient_norm,
        "tokens": report.tokens,
        "batch": report.batch,
    }
    return line if report.evaluation is None else {**line, "evaluation": _evaluation(report.evaluation)}


def _evaluation(found: Evaluation) -> dict[str, Any]:
    return {"loss": found.loss, "targets": found.targets}


def speed(report: StepReport) -> dict[str, Any]:
    """A step's line of what depends on the machine."""
    return {"step": report.step, "seconds": report.seconds}
