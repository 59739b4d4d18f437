"""What every test shares: fixed seeds, no network, no cache of the person who runs them, and a way to
run the command line in this process."""

from __future__ import annotations

import importlib
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from lathe.cli.main import main

# Deadlines are timings, and timings are not facts; derandomised, a failure on one machine is one on all.
settings.register_profile("lathe", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lathe")

_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Ran:
    """What one run of the command line left: its exit code and what it wrote to each stream."""

    code: int
    out: str
    err: str


def pytest_configure(config: pytest.Config) -> None:
    """Settle the environment before any test module imports a library that reads it."""
    # The tests write tiny checkpoints, and must never meet (or fill) a person's own hub cache.
    os.environ.pop("HF_ENDPOINT", None)
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["MPLBACKEND"] = "agg"
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _own_hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the hub's cache in a folder of this run, for what reads it late or in a subprocess."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine: a test that needs one is wrong."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise ConnectionRefusedError(f"a test tried to reach {address[0]}; tests use no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start each test from the same random state, whatever ran before it in this process."""
    random.seed(0)
    # Not imported for a test that does without: most of the planner's do.
    if "numpy" in sys.modules:
        importlib.import_module("numpy").random.seed(0)
    if "torch" in sys.modules:
        importlib.import_module("torch").manual_seed(0)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `lathe WORDS…` in this process: `cli("plan", "t5-small", "--json").out`."""

    def run(*words: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
