"""What every contestant can be asked for, and how it says that it cannot."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

Ids = list[list[int]]  # rows of one length


class Unfit(Exception):
    """This contestant cannot run this shape here; the message says why, and stands in its row of the table."""


class Runner(Protocol):
    """A loaded model. `kind` is `causal`, `seq2seq` or `encoder`."""

    def __init__(self, files: Path, kind: str, threads: int, **options: str) -> None:
        """Load the model that `prepare` wrote, or the stock directory where there is nothing to prepare."""

    def generate(self, prompts: Ids, new: int) -> Ids:
        """The `new` likeliest tokens after each prompt, one by one; no end token ends a row earlier."""

    def encode(self, rows: Ids) -> np.ndarray:
        """The encoder's last hidden states, B × T × D, float32."""

    def score(self, prompt: list[int], target: list[int]) -> dict[str, np.ndarray]:
        """What the model says of `target` after `prompt`: `log_probs` (T), and `logits` (T × V) where it tells."""


def versions(*packages: str, missing: str) -> str:
    """The packages with their versions, without importing them.

    Raises:
        Unfit: with the words `missing`, where one is not installed.
    """
    try:
        return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    except metadata.PackageNotFoundError:
        raise Unfit(f"not installed: {missing}") from None


def log_probs(logits_TV: np.ndarray, target: list[int]) -> np.ndarray:
    """The log-probability of each target token under its row of logits."""
    exact_TV = logits_TV.astype(np.float64)
    exact_TV -= exact_TV.max(axis=1, keepdims=True)
    return np.asarray(exact_TV[np.arange(len(target)), target] - np.log(np.exp(exact_TV).sum(axis=1)))
