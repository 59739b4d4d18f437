"""Whether a batch fits into memory, said before any of it is taken.

The cache is the part that grows with rows and length, and the planner knows its bytes
(`lathe.planner.memory.cache_bytes`); each row adds its logits. What else a step needs is less and is left out, so
a batch that is refused could not have run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.planner.memory import cache_bytes
from lathe.planner.quantities import bytes_text


def decoding_bytes(
    architecture: Architecture, rows: int, slots: int, prompts: int, source: int, itemsize: int, *, shared: int = 0
) -> int:
    """The bytes of the cache and of one step's logits.

    Args:
        rows: that are decoded at once; each keeps `slots` tokens of its own.
        prompts: whose `source` tokens are kept for cross-attention, shared by the rows that read them.
        itemsize: bytes of one number of the cache.
        shared: tokens that all rows begin with, kept once.
    """
    per = cache_bytes(architecture)
    tokens = rows * (slots + 1) + (shared + 1 if shared else 0)  # each row of a cache has a spare slot for pads
    kept = tokens * per.per_token["float32"] + prompts * source * per.per_source_token["float32"]
    return kept * itemsize // torch.float32.itemsize + rows * architecture.embedding.vocab_size * torch.float32.itemsize


def check_room(needed: int, rows: int, slots: int, device: torch.device) -> None:
    """Raise RequestError where the device has less memory than `needed` bytes."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise RequestError(
            f"a cache for {rows:,} rows of {slots:,} tokens does not fit into memory: "
            f"it needs {bytes_text(needed)} and {bytes_text(free)} are free; "
            "ask for fewer new tokens, fewer beams, or fewer rows at once"
        )


def free_bytes(device: torch.device) -> int | None:
    """The memory that can still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type != "cpu":
        return None
    found = [each for each in (_available(), _within_limit()) if each is not None]
    return min(found) if found else None


def _available() -> int | None:
    """What Linux can give without swapping."""
    text = _read(Path("/proc/meminfo"))
    lines = [line.split() for line in text.splitlines() if line.startswith("MemAvailable:")]
    return int(lines[0][1]) * 1024 if lines else None


def _within_limit() -> int | None:
    """What is left of a container's limit (cgroup 2); files that Linux keeps in memory can make room."""
    folder = Path("/sys/fs/cgroup")
    limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return None
    files = [
        line.split()[1] for line in _read(folder / "memory.stat").splitlines() if line.startswith("inactive_file ")
    ]
    return int(limit) - int(used) + (int(files[0]) if files else 0)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii") if path.is_file() else ""
