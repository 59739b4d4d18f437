"""The build: whole or not at all, and a reason that is kept where there is no compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lathe.engine import build, native


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that what is built goes to."""
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_step.so")
    monkeypatch.setattr(build, "REASON", tmp_path / "_step.txt")
    return tmp_path


def test_no_compiler_leaves_a_reason_and_no_library(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.build_or_say_why() == build.REASON.read_text(encoding="utf-8").strip()
    assert "no C++ compiler" in build.REASON.read_text(encoding="utf-8")
    assert not build.LIBRARY.exists()


@pytest.mark.parametrize(("compiler", "said"), [("/nowhere/c++", "cannot be run"), ("false", "failed")])
def test_a_compiler_that_fails_is_a_reason(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    why = build.build_or_say_why()
    assert why is not None
    assert said in why
    assert [file.name for file in elsewhere.iterdir()] == ["_step.txt"]


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.why_not() is not None:
        pytest.skip(str(native.why_not()))
    monkeypatch.setattr(build, "fingerprint", lambda: "another")
    native.library.cache_clear()
    try:
        assert "of other sources" in str(native.why_not())
    finally:
        native.library.cache_clear()


def test_the_sources_have_no_warnings() -> None:
    """The part that does not depend on the instruction set; a build of everything takes half a minute."""
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    strict = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", '-DLATHE_FINGERPRINT="none"']
    for name in ("api", "program", "pool", "kernels_portable"):
        command = [compiler, *strict, str(build.SOURCES / f"{name}.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
