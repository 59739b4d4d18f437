"""The processes of one run: which of them this is, and how they agree.

`torchrun` starts the same program several times and tells each its rank. Every rank makes the same decisions from
the same numbers, so little has to be said: sums over ranks, what the main rank found on the disk, and whether its
writing went well. These few values go through gloo, on the CPU, whatever the tensors of the model go through.

What touches the disk or speaks to a person is done once, by the main rank. An error is said once as well: the
first rank that fails takes a number from a counter that all share, and only the one with the first number speaks.
Those that fail because it left are quiet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lathe.errors import LatheError

T = TypeVar("T")

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long ranks wait for each other: for the main one to tokenise a corpus, or to write to a slow disk.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. All methods but the properties are called by every rank, in one order.

    Args:
        rank: of this process, below `size`.
        local: its number on its own machine.
        grouped: whether torch's process group is up; a rank may be alone in one.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    grouped: bool = False

    @property
    def main(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in double precision: the same bits on all."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main rank, which alone does it. A `LatheError` there is raised on all ranks."""
        if self.size == 1:
            return work()
        told: list[Any] = [_tried(work)] if self.main else [None]
        dist.broadcast_object_list(told, src=0)
        if isinstance(told[0], LatheError):
            raise told[0]
        found: T = told[0]
        return found

    def one_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, after one of each machine has done it: it fills the caches for the others.

        A `LatheError` of a first one is raised on all ranks.
        """
        found = _tried(work) if self.local == 0 else None
        failures = self.gather(found if isinstance(found, LatheError) else None)
        for failure in failures:
            if failure is not None:
                raise failure
        return work() if self.local != 0 else cast(T, found)


ALONE = Ranks()


def _tried(work: Callable[[], T]) -> T | LatheError:
    try:
        return work()
    except LatheError as error:
        return error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, for as long as the block lasts; `ALONE` where it did not start this process.

    An exception leaves the block on the first rank that meets one. On the others it becomes a quiet exit with the
    same code. Warnings are the main rank's alone.
    """
    if any(name not in os.environ for name in _TORCHRUN):
        yield ALONE
        return
    store, rank, size = next(iter(rendezvous("env://")))
    store.set_timeout(_PATIENCE)
    # Two backends where there is a GPU: tensors on it go through NCCL, everything else through gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=_PATIENCE)
    with _quiet(rank != 0):
        try:
            yield Ranks(rank, size, int(os.environ["LOCAL_RANK"]), grouped=True)
        except Exception as error:
            if size > 1 and not _is_first(store):
                raise SystemExit(getattr(error, "exit_code", 1)) from None
            if _lost_touch(error):
                raise LatheError(
                    f"rank {rank} of {size} lost touch with another process of this run: see whether the system killed "
                    "it (for memory, perhaps); a resume goes on from the last checkpoint"
                ) from error
            raise
    # Not after a failure: the ranks that are left would wait for each other, and the process ends anyway.
    dist.destroy_process_group()


def _is_first(store: Store) -> bool:
    try:
        return bool(store.add("lathe/failed", 1) == 1)
    except RuntimeError:  # the store went with the rank that kept it
        return False


def _lost_touch(error: Exception) -> bool:
    # gloo has no type of its own for it, but names its own source file.
    return type(error) is RuntimeError and "gloo/transport" in str(error)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    log = logging.getLogger("lathe")
    level = log.level
    if quiet:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
