"""Where to train, and how fast that is at best.

The peak is measured, not looked up: a square product of matrices, large enough to fill the device, in the
precision of the run. What share of it a run reaches says how much of the machine the rest of the work costs.
"""

from __future__ import annotations

import time

import torch

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.planner.flops import forward
from lathe.train.loss import autocast
from lathe.train.ranks import ALONE, Ranks

_SIZES = {"cpu": 1024, "cuda": 8192, "mps": 2048}
_ROUNDS = 5


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else Apple's MPS, else the CPU.

    Where `torchrun` started several processes, each takes the GPU of its number on its machine, which becomes the
    process's current one; `auto` then passes MPS over, on which processes cannot add up tensors.

    Raises:
        RequestError: there is no such device here, or not one for each process.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available() and not ranks.grouped
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if ranks.grouped:
        name = _own(name, ranks)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise RequestError(f"device={name}: there is no such device here; auto takes the best there is") from None
    if ranks.grouped and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _own(name: str, ranks: Ranks) -> str:
    """The name of the device of that kind that is this rank's."""
    if name not in ("cuda", "cpu"):
        raise RequestError(f"device={name} under torchrun: expected cuda (each process takes its own), cpu or auto")
    if name == "cpu":
        return name
    found = torch.cuda.device_count()
    if ranks.local >= found:
        raise RequestError(
            f"device=cuda: process {ranks.local + 1} of this machine has no GPU, for there are {found}; "
            "start one process for each with --nproc-per-node, or give device=cpu"
        )
    return f"cuda:{ranks.local}"


def matrix_peak(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of one large product of matrices: the best of a few rounds."""
    n = _SIZES.get(device.type, 1024)
    a, b = (torch.ones(n, n, device=device) for _ in range(2))
    best = float("inf")
    with torch.no_grad(), autocast(device, precision):
        if precision == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def flops_of_training(architecture: Architecture, length: int, tokens: int, targets: int, checkpointing: bool) -> float:
    """Matrix operations of training on `tokens` tokens that ask `targets` labels, in rows of `length` positions.

    Backward is twice forward; recomputing activations is one forward more. The head is counted where it is asked.
    """
    counted = forward(architecture, length)
    head = counted.by_component["head"]
    once = (counted.total - head) / counted.tokens * tokens + head / length * targets
    return (4 if checkpointing else 3) * once
