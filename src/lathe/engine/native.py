"""The native step's library: found, checked against its sources, and called through ctypes."""

from __future__ import annotations

import ctypes
import functools

from lathe.engine import build
from lathe.engine.layout import Call, Linear, Norm, Op, Spec, Steps
from lathe.errors import LatheError


class NoLibrary(Exception):
    """There is no library to use; the message says why."""


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, loaded once.

    Raises:
        NoLibrary: it was not built, or of other sources than those that stand beside it.
    """
    if not build.LIBRARY.is_file():
        why = "Lathe runs from its sources and was not installed"
        if build.REASON.is_file():
            why = build.REASON.read_text(encoding="utf-8").strip()
        raise NoLibrary(f"native step not built: {why}; python -m lathe.engine.build builds it")
    try:
        found = ctypes.CDLL(str(build.LIBRARY))
        found.lathe_fingerprint.restype = ctypes.c_char_p
        made_of = found.lathe_fingerprint().decode()
    except (OSError, AttributeError) as error:
        raise NoLibrary(f"native step not built: {build.LIBRARY.name} cannot be loaded ({error})") from None
    if made_of != build.fingerprint():
        raise NoLibrary(
            "native step not built: the library is of other sources than these; python -m lathe.engine.build builds it"
        )
    sizes = [ctypes.sizeof(each) for each in (Op, Linear, Norm, Spec, Call, Steps)]
    theirs = [found.lathe_sizes(which) for which in range(len(sizes))]
    if sizes != theirs:
        raise NoLibrary(f"native step not built: its structs are {theirs} bytes and Python's {sizes}")
    found.lathe_instructions.restype = ctypes.c_char_p
    found.lathe_instructions.argtypes = [ctypes.c_char_p]
    found.lathe_new.restype = ctypes.c_void_p
    found.lathe_new.argtypes = [ctypes.POINTER(Spec), ctypes.c_char_p]
    found.lathe_free.restype = None
    found.lathe_free.argtypes = [ctypes.c_void_p]
    found.lathe_run.argtypes = [ctypes.c_void_p, ctypes.POINTER(Call), ctypes.c_int]
    found.lathe_go_on.argtypes = [ctypes.c_void_p, ctypes.POINTER(Call), ctypes.POINTER(Steps)]
    found.lathe_advise.restype = None
    found.lathe_advise.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for pack in (found.lathe_pack_bytes, found.lathe_pack_nibbles):
        pack.restype = None
        pack.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
    return found


def why_not() -> str | None:
    """Why there is no native step; None where there is one."""
    try:
        library()
    except NoLibrary as error:
        return str(error)
    return None


def instructions(name: str | None = None) -> str | None:
    """The instruction set that is used: the best of this machine, or `name` where the machine has it, else None."""
    found = library().lathe_instructions(None if name is None else name.encode())
    return None if found is None else str(found.decode())


class Handle:
    """A native program, freed with this object."""

    def __init__(self, spec: Spec, instruction_set: str | None) -> None:
        self._library = library()
        name = None if instruction_set is None else instruction_set.encode()
        self._program = self._library.lathe_new(ctypes.byref(spec), name)
        if not self._program:
            raise LatheError(f"no memory for the native step, or no such instruction set here: {instruction_set}")

    def run(self, call: Call, *, reads_memory: bool = False) -> None:
        """Run one pass; LatheError where memory runs out."""
        _check(self._library.lathe_run(self._program, ctypes.byref(call), int(reads_memory)))

    def go_on(self, call: Call, steps: Steps) -> None:
        """Run several steps; LatheError where memory runs out."""
        _check(self._library.lathe_go_on(self._program, ctypes.byref(call), ctypes.byref(steps)))

    def __del__(self) -> None:
        if getattr(self, "_program", None):
            self._library.lathe_free(self._program)


def _check(failed: int) -> None:
    if failed:
        raise LatheError("no memory for this many tokens at once; pass fewer or shorter rows")
