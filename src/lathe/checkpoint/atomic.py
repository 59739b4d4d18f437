"""Write a whole directory or file, or nothing.

A save that dies half-way (a kill, a full disk, Ctrl-C) must not leave something that looks like a
checkpoint. So everything is written to a temporary sibling, on the same filesystem, flushed to the disk,
and only then renamed into place, which the filesystem does in one step.

- *Replacing.* The new directory and the old one are exchanged in one step where the system can do that
  (`renameat2` on Linux, `renamex_np` on macOS). Where it cannot (some network filesystems) the old one is
  moved aside first; a kill between the two renames leaves it whole under another name, and `recover`, which
  every save calls first, puts it back.
- *Leftovers.* A process that was killed cannot clean up. Each writer therefore holds a lock (`flock`) on
  its temporary; the system drops the lock when the process ends, however it ends. The next save to the same
  place removes every temporary that nobody holds. Where the filesystem has no locks, nothing is removed.

Linux and macOS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.errors import ExistsError, LatheError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEW, _OLD = ".lathe-new-", ".lathe-old-"
# No space, over the quota, over the size limit of a file.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CANNOT_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h; RENAME_SWAP of macOS is 2 as well


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, replace: bool = False, nbytes: int | None = None
) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the block ends without an exception.

    Missing parents are made; a link is followed, so the directory that it points to is written. On any
    exception, Ctrl-C included, the temporary is removed and `path` is what it was before.

    Args:
        path: the directory to write. It must not exist, or be empty.
        replace: let it hold something; all of it then makes way for the new directory.
        nbytes: how many bytes will be written, where that is known: a disk with less room is refused at once.

    Raises:
        RequestError: `path` exists (and is not to be replaced), is a file, or cannot be written to.
        LatheError: the disk is full.
    """
    target = _resolve(path)
    recover(target)
    _refuse_directory(target, replace)
    with _staged(target, nbytes, directory=True) as temporary:
        yield temporary
        _sync_tree(temporary)
        _refuse_directory(target, replace)  # somebody may have written there in the meantime
        if target.exists() and any(target.iterdir()):
            # What cannot be removed here is removed by the next save: the new directory is in place.
            shutil.rmtree(_swap(temporary, target), ignore_errors=True)
        else:
            temporary.rename(target)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, replace: bool = False, nbytes: int | None = None) -> Iterator[Path]:
    """Yield the path of an empty temporary file that becomes `path` when the block ends without an exception.

    The temporary's name ends as `path` does, for writers that look at the suffix. Arguments and errors are
    those of `atomic_directory`.
    """
    target = _resolve(path)
    _refuse_file(target, replace)
    with _staged(target, nbytes, directory=False) as temporary:
        yield temporary
        _sync(temporary)
        _refuse_file(target, replace)
        temporary.replace(target)


@contextmanager
def scratch_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary directory on the filesystem where `path` will be; it is gone after the block.

    The scratch of a process that was killed is removed by the next one, and by the next save, to the same `path`.
    No parent is made: while one is missing, the scratch lies in the nearest folder that exists.

    Raises:
        RequestError: that folder cannot be written to.
        LatheError: the disk is full.
    """
    target = _resolve(path)
    folder = next(parent for parent in target.parents if parent.is_dir())
    with _staged(folder / target.name, None, directory=True) as temporary:
        try:
            yield temporary
        finally:
            _remove(temporary)


def recover(path: str | os.PathLike[str]) -> bool:
    """Put back the directory that a killed save had moved aside; True if there was one.

    Needed only where directories cannot be exchanged in one step. Call it before concluding that `path` is
    not there. It does nothing when `path` exists, or while another process is in the middle of its save.
    """
    target = _resolve(path)
    if target.exists():
        return False
    for aside in _siblings(target, _OLD):
        # Without locks the worst that can happen is that a save that is just ending fails, and the old one stays.
        with _unused(aside, without_locks=True) as unused:
            if unused and not target.exists():
                aside.rename(target)
                return True
    return False


@contextmanager
def _staged(target: Path, nbytes: int | None, *, directory: bool) -> Iterator[Path]:
    """Make the temporary, hold its lock while the caller fills and publishes it, and clean up if that fails."""
    made: list[Path] = []
    temporary: Path | None = None
    try:
        try:
            made = _make_parents(target)
            _remove_leftovers(target)
            _require_room(target, nbytes)
            temporary, lock = _reserve(target, directory)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            raise RequestError(f"cannot write to {target}: {error.strerror}; choose another place") from error
        try:
            yield temporary
        finally:
            os.close(lock)
        _sync(target.parent)
    except BaseException as error:
        if temporary is not None:
            _remove(temporary)
        for parent in reversed(made):
            with suppress(OSError):  # somebody else put something there: it stays
                parent.rmdir()
        told = isinstance(error, LatheError)  # of a place of its own, by a save inside this one
        full = _no_room(error) if isinstance(error, Exception) and not told else None
        if full is not None:
            raise _full(target, full, nbytes) from error
        raise


def _resolve(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().resolve()


def _refuse_directory(target: Path, replace: bool) -> None:
    if not target.is_dir():
        if target.exists():
            raise RequestError(f"{target} is a file, where a directory is to be written: choose another name")
        return
    if not replace and any(target.iterdir()):
        raise ExistsError(
            f"{target} already exists and is not empty: choose another directory",
            "pass replace=True to replace all that it holds",
        )
    for place in (Path.cwd(), Path(os.environ.get("HOME", os.devnull))):
        if place.resolve().is_relative_to(target):
            raise RequestError(f"{target} would be replaced, but it holds {place}: choose another directory")


def _refuse_file(target: Path, replace: bool) -> None:
    if target.is_dir():
        raise RequestError(f"{target} is a directory, where a file is to be written: choose another name")
    if target.exists() and not replace:
        raise ExistsError(f"{target} already exists: choose another name", "pass replace=True to replace it")


def _make_parents(target: Path) -> list[Path]:
    """Make the missing directories above `target`; the ones made, outermost first."""
    missing = [folder for folder in target.parents if not folder.exists()]
    lowest = target.parents[len(missing)]
    if not lowest.is_dir():
        raise RequestError(f"cannot write to {target}: {lowest} is a file; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _require_room(target: Path, nbytes: int | None) -> None:
    if nbytes is not None and shutil.disk_usage(target.parent).free < nbytes:
        raise _full(target, errno.ENOSPC, nbytes)


def _full(target: Path, number: int, nbytes: int | None) -> LatheError:
    folder = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if number == errno.EFBIG:
        remedy = "raise the limit on the size of a file (ulimit -f)"
    else:  # what was asked for may fit by now, since what was begun is removed
        needed = f"{nbytes:,} bytes are needed, " if nbytes is not None and nbytes > free else ""
        remedy = f"{needed}{free:,} bytes are free now; free some space"
    return LatheError(
        f"cannot write {target}: {os.strerror(number)}; {remedy} or choose another place; nothing was changed there"
    )


def _no_room(error: BaseException) -> int | None:
    """The error number of a full disk, if that is what `error` or what it was raised from says."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return cause.errno
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


# --- temporaries and their locks -----------------------------------------------------------------------


def _reserve(target: Path, directory: bool) -> tuple[Path, int]:
    """A new temporary beside `target`, and the file descriptor that holds its lock."""
    while True:
        temporary = target.with_name(f"{_NEW}{secrets.token_hex(6)}.{target.name}")
        if directory:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        with suppress(FileNotFoundError):  # another save took it for a leftover before it was locked
            lock = os.open(temporary, os.O_RDONLY)
            if _try_lock(lock) is not False and _same(lock, temporary):
                return temporary, lock
            os.close(lock)


def _siblings(target: Path, prefix: str) -> list[Path]:
    """The temporaries of `target`, of this or of earlier processes."""
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{12}\." + re.escape(target.name))
    try:
        return sorted(entry for entry in target.parent.iterdir() if name.fullmatch(entry.name))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # nothing of ours can be there


def _remove_leftovers(target: Path) -> None:
    """Remove the temporaries that no process holds, and old directories once `target` is there again."""
    asides = _siblings(target, _OLD) if target.exists() else []
    for leftover in (*_siblings(target, _NEW), *asides):
        with _unused(leftover) as unused:
            if unused:
                _remove(leftover)


@contextmanager
def _unused(path: Path, *, without_locks: bool = False) -> Iterator[bool]:
    """Whether no process holds `path`, which this one then does inside the block.

    Where the filesystem has no locks the answer is what `without_locks` says.
    """
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:  # it is gone, or belongs to somebody else
        yield False
        return
    try:
        locked = _try_lock(lock)
        yield (without_locks if locked is None else locked) and _same(lock, path)
    finally:
        os.close(lock)


def _try_lock(descriptor: int) -> bool | None:
    """True: locked here. False: another process holds it. None: this filesystem has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether `path` still names what `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    """Remove a file or a directory; what resists is left to the next save."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


# --- flushing and renaming -----------------------------------------------------------------------------


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems flush files but know no flushing of a directory.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Flush every file below `directory`, then every directory, so that the rename comes last on the disk."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            entry = Path(folder, name)
            if entry.is_file() and not entry.is_symlink():
                _sync(entry)
        _sync(Path(folder))


def _swap(new: Path, old: Path) -> Path:
    """Put `new` in the place of `old`; where the old one is now."""
    if _exchange(new, old):
        return new
    aside = old.with_name(f"{_OLD}{secrets.token_hex(6)}.{old.name}")
    lock = os.open(old, os.O_RDONLY)  # the lock moves with the directory and keeps `recover` away from it
    try:
        _try_lock(lock)
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            aside.rename(old)
            raise
    finally:
        os.close(lock)
    return aside


def _exchange(first: Path, second: Path) -> bool:
    """Let two directories change places in one step; False where the system or the filesystem cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    flag = ctypes.c_uint(_RENAME_EXCHANGE)
    if sys.platform == "darwin":
        call, arguments = getattr(libc, "renamex_np", None), (*names, flag)
    else:
        call, arguments = getattr(libc, "renameat2", None), (_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))
