"""Where a verb writes, looked at before the work."""

from __future__ import annotations

from pathlib import Path

from lathe.errors import RequestError


def require_free(destination: Path) -> None:
    """Refuse before the work what would be refused after it."""
    if destination.is_file():
        raise RequestError(f"{destination} is a file, where a directory is to be written: choose another name")
    if destination.is_dir() and any(destination.iterdir()):
        raise RequestError(f"{destination} already exists and is not empty: choose another directory")
