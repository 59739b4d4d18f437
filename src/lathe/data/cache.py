"""Text tokenised once: memory-mapped arrays on the disk, found again by what they were made of.

The name of a cache is a hash of every record, of the tokenizer's files and of how the text was cut. Another
column, prefix, order or tokenizer is therefore another cache, and a file that was only moved or packed is the same
one. Hashing reads the records once at every start, which takes a small part of what tokenising them takes.

A cache is a directory: one flat array a field, the table of its ends, and `cache.json` with the size and the
checksum of each. It is written beside its place and renamed into it, so it is whole or not there. A process that
finds another one at work on it waits and then reads what that one wrote. A cache whose files do not have their
checksums is made again, with a warning in the log that names the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lathe.checkpoint.atomic import atomic_directory
from lathe.data.corpus import Corpus, Ragged
from lathe.data.tokenise import BREAKS, LABEL, Encoder, Rows
from lathe.errors import LatheError, RequestError
from lathe.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_VERSION = 2  # of the files' layout and of what stands in them; another one is another cache
_MANIFEST = "cache.json"
Records = Callable[[], Iterable[Mapping[str, str]]]


def cached(
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer,
    records: Records,
    *,
    breaks: str | None = None,
    labels: Sequence[str] | None = None,
) -> Corpus:
    """The corpus of these records, tokenised now or found in `folder`.

    Args:
        folder: holds any number of caches; it is made if need be.
        records: called for the records, once to name them and once more if they must be tokenised:
            `lambda: read("reviews.txt.gz")`.
        breaks, labels: as in `tokenise_records`.

    Raises:
        RequestError: what `read` and `tokenise_records` raise; a folder that cannot be written to.
        LatheError: the disk is full, or the records changed between the two calls.
    """
    encoder = Encoder(tokenizer, breaks, labels)
    name = _name(tokenizer, records(), breaks, labels)
    place = Path(folder).expanduser().resolve() / name
    found = _open(place, loud=False)
    if found is not None:
        return found
    with _alone(place):
        found = _open(place)  # another process may have written it while this one waited
        if found is None:
            _write(place, encoder, records, name)
            found = _open(place)
    if found is None:
        raise LatheError(f"the cache {place} is damaged although it was just written; is the disk sound?")
    return found


def _name(
    tokenizer: Tokenizer, records: Iterable[Mapping[str, str]], breaks: str | None, labels: Sequence[str] | None
) -> str:
    digest = _started(tokenizer, breaks, labels)
    for _ in _hashed(records, digest):
        pass
    return _short(digest)


def _short(digest: Any) -> str:
    return str(digest.hexdigest())[:24]


def _started(tokenizer: Tokenizer, breaks: str | None, labels: Sequence[str] | None) -> Any:
    digest = hashlib.sha256(json.dumps([_VERSION, breaks, list(labels) if labels is not None else None]).encode())
    for file, data in sorted(tokenizer.files.items()):
        digest.update(f"{file}:{len(data)}:".encode())
        digest.update(data)
    return digest


def _hashed(records: Iterable[Mapping[str, str]], digest: Any) -> Iterator[Mapping[str, str]]:
    """The records as they come, each put into the digest."""
    for record in records:
        # A list in JSON says where each text begins and ends; escaped, so that half a surrogate pair gets as far as
        # the tokenizer, which names it.
        digest.update(json.dumps(list(record.items())).encode("ascii"))
        yield record


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Hold the lock of one cache; it falls with the process, however that ends.

    Where the filesystem has no locks, two processes write the same cache one after the other.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(place.with_name(f".{place.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise RequestError(f"cannot write to {place.parent}: {error.strerror}; choose another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _LOG.warning("%s has no locks (%s): two processes may both tokenise", place.parent, error.strerror)
        yield
    finally:
        os.close(lock)


# --- writing -------------------------------------------------------------------------------------------


def _write(place: Path, encoder: Encoder, records: Records, name: str) -> None:
    digest = _started(encoder.tokenizer, encoder.breaks, encoder.labels)
    with atomic_directory(place, replace=True) as temporary:
        columns: dict[str, _Column] = {}
        with ExitStack() as files:
            for chunk in encoder.chunks(_hashed(records(), digest)):
                for field, rows in chunk.items():
                    if field not in columns:
                        dtype = _dtype(field, encoder.tokenizer.vocab_size)
                        columns[field] = _Column(files.enter_context((temporary / f"{field}.tokens").open("wb")), dtype)
                    columns[field].add(rows)
        if not columns:
            raise RequestError("the data holds no document; give a file that holds some")
        if _short(digest) != name:
            raise LatheError("the data changed while it was read; start again when nothing writes to it")
        for field, column in columns.items():
            (temporary / f"{field}.ends").write_bytes(np.array(column.ends, dtype="<i8").tobytes())
        manifest = {
            "fields": {field: column.dtype for field, column in columns.items()},
            "files": {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(temporary.iterdir())},
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _dtype(field: str, vocab_size: int) -> str:
    if field == LABEL:
        return "<i8"
    return "<u4" if field == BREAKS or vocab_size > 2**16 else "<u2"


class _Column:
    """One field as it is written: tokens to the file, ends in memory."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        self.file, self.dtype, self.ends, self.total = file, dtype, list[int](), 0

    def add(self, rows: Rows) -> None:
        for row in rows:
            self.total += len(row)
            self.ends.append(self.total)
        flat = np.fromiter((token for row in rows for token in row), dtype=self.dtype)
        self.file.write(flat.tobytes())


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- reading -------------------------------------------------------------------------------------------


def _open(place: Path, *, loud: bool = True) -> Corpus | None:
    """The corpus of a cache; None where there is none, or where it is damaged, which `loud` puts in the log."""
    if not place.is_dir() or not any(place.iterdir()):
        return None
    try:
        manifest = json.loads((place / _MANIFEST).read_bytes())
        for name, (nbytes, checksum) in manifest["files"].items():
            if (place / name).stat().st_size != nbytes or _checksum(place / name) != checksum:
                raise ValueError(f"{name} is not what was written")
        columns = {field: _column(place, field, dtype) for field, dtype in manifest["fields"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if loud:
            _LOG.warning("the cache %s is damaged (%s); tokenising again", place, error)
        return None
    labels = columns.pop(LABEL, None)
    breaks = columns.pop(BREAKS, None)
    return Corpus(columns, breaks=breaks, labels=None if labels is None else np.array(labels.flat, dtype=np.int64))


def _column(place: Path, field: str, dtype: str) -> Ragged:
    ends = _mapped(place / f"{field}.ends", "<i8")
    return Ragged(_mapped(place / f"{field}.tokens", dtype), ends)


def _mapped(file: Path, dtype: str) -> NDArray[Any]:
    if not file.stat().st_size:
        return np.zeros(0, dtype=dtype)  # nothing cannot be mapped
    return np.memmap(file, dtype=dtype, mode="r")
