"""Compile the native step: plain C++17, with whatever compiler the machine has, into one library beside this file.

The build hook (`hatch_build.py`) runs this when Lathe is installed. Where there is no compiler the installation goes
on and says so; the engine then runs the model's own modules, which give the same tokens. `python -m lathe.engine.build`
builds it later.

Each instruction set is a file of its own, compiled with its own flags; the library picks one when it runs, so one
build serves every machine of its kind. The library carries a fingerprint of the sources that it was made of, and one
that does not fit the sources beside it is not used.

Nothing of Lathe is imported here: the hook runs before Lathe is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
LIBRARY = Path(__file__).parent / "_step.so"
# Why there is no library, for whoever asks for the engine later.
REASON = Path(__file__).parent / "_step.txt"

# No -ffast-math: a sum's order is the program's, and NaN stays NaN.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-pthread"]
_WIDE = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# What each file of kernels is compiled with on x86; elsewhere only the portable one is.
_X86 = {
    "kernels_avx512vnni": [*_WIDE, "-mavx512vnni"],
    "kernels_avx512": _WIDE,
    "kernels_avxvnni": ["-mavx2", "-mfma", "-mavxvnni"],
    "kernels_avx2": ["-mavx2", "-mfma"],
}
_EVERYWHERE = ["kernels_portable", "pool", "program", "api"]


class NotBuilt(Exception):
    """The library could not be made; the message says why."""


def fingerprint() -> str:
    """Of the sources: a library is used only with those that it was made of."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def build(*, warnings: bool = False) -> Path:
    """Compile the library and put it in its place, whole or not at all.

    Args:
        warnings: whether a warning of the compiler is an error.

    Raises:
        NotBuilt: no compiler, or one that fails.
    """
    compiler = _compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*_FLAGS, f'-DLATHE_FINGERPRINT="{fingerprint()}"']
    if warnings:
        # GCC 12 takes a placeholder of its own intrinsics for a variable that nobody set.
        flags += ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    jobs = {name: list[str]() for name in _EVERYWHERE}
    if x86:
        jobs |= _X86
        flags.append("-DLATHE_X86")
        if _takes(compiler, "-mavxvnni"):
            flags.append("-DLATHE_AVXVNNI")
        else:
            del jobs["kernels_avxvnni"]
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(name: str) -> str:
            made = str(Path(folder) / f"{name}.o")
            _run([*compiler, *flags, *jobs[name], "-c", str(SOURCES / f"{name}.cpp"), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            objects = list(threads.map(compile_one, jobs))
        linked = Path(folder) / "step.so"
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(linked)])
        # A running process may have the old library open: the new one takes its name, not its place.
        staged = LIBRARY.with_name(f".{LIBRARY.name}.{os.getpid()}")
        try:
            shutil.copy(linked, staged)
            staged.replace(LIBRARY)
        except OSError as error:
            raise NotBuilt(f"{LIBRARY} cannot be written: {error.strerror}") from error
        finally:
            staged.unlink(missing_ok=True)
    REASON.unlink(missing_ok=True)
    return LIBRARY


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    if given:
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt("no C++ compiler (c++, g++ or clang++) was found; install one, or name it in CXX")


def _takes(compiler: list[str], flag: str) -> bool:
    return _call([*compiler, flag, "-x", "c++", "-fsyntax-only", os.devnull]).returncode == 0


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotBuilt(f"the compiler {command[0]} cannot be run: {error.strerror}") from error


def _run(command: list[str]) -> None:
    done = _call(command)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise NotBuilt(f"{command[0]} failed: {said.strip()}")


def build_or_say_why() -> str | None:
    """Build; None where it worked, else the reason, which is also kept beside the library's place."""
    try:
        build()
    except NotBuilt as error:
        LIBRARY.unlink(missing_ok=True)
        REASON.write_text(str(error) + "\n", encoding="utf-8")
        return str(error)
    return None


if __name__ == "__main__":
    why = build_or_say_why()
    sys.stdout.write(f"built {LIBRARY}\n" if why is None else f"not built: {why}\n")
    sys.exit(0 if why is None else 1)
