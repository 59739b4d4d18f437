"""Checksums: what a file holds, in 64 characters.

Training writes them beside a checkpoint and compares them before it resumes, so that a file that changed on
the disk, or was copied badly, is named. SHA-256 is also what the hub knows a large file by.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.errors import RequestError

if TYPE_CHECKING:
    import os


def digest_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits; the file is read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(directory: str | os.PathLike[str]) -> dict[str, str]:
    """The SHA-256 of every file below `directory`: path relative to it, with `/` -> hexadecimal digits.

    Sorted by path. A link to a file counts as the file (the hub's cache is made of them).

    Raises:
        RequestError: `directory` is not a directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise RequestError(f"{root} is not a directory: give the directory whose files are to be summed")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): digest_file(path) for path in files}
