"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import lathe

_MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(lathe.__path__, prefix="lathe.")
    if not found.name.endswith("__main__")
)
_WITH_EXAMPLES = {
    name
    for name in _MODULES
    if (source := importlib.util.find_spec(name)) is not None
    and source.origin is not None
    and source.origin.endswith(".py")  # the native step is a library
    and ">>> " in Path(source.origin).read_text(encoding="utf-8")
}


@pytest.mark.parametrize("name", sorted(_WITH_EXAMPLES))
def test_the_examples_of_a_module_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_has_a_docstring_and_an_example() -> None:
    for name in set(lathe.__all__) - {"__version__", "LatheError", "RequestError"}:
        text = getattr(lathe, name).__doc__
        assert ">>> " in (text or ""), f"lathe.{name} has no runnable example"
    for method in (lathe.Model.save, lathe.Model.generate, lathe.Model.plan, lathe.Architecture.with_):
        assert ">>> " in (method.__doc__ or ""), f"{method.__qualname__} has no runnable example"
