"""What may be imported where, as a fresh interpreter sees it (import-linter holds the layers themselves)."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lathe
from lathe.cli.main import VERBS

WITHOUT_TORCH = ("architecture", "blueprint", "presets", "planner", "families", "cli")
_HEAVY = ("torch", "transformers", "matplotlib")


def _loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules `names` a fresh interpreter has loaded once it has run `statement`."""
    script = f"import sys\n{statement}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def _modules_of(package: str) -> list[str]:
    """`package` with every module below it, or just itself where it is a plain module."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is listed here and does not exist"
    locations = spec.submodule_search_locations or []
    return [package, *(found.name for found in pkgutil.walk_packages(locations, prefix=f"{package}."))]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_planning_floors_and_the_command_line_start_without_torch(name: str) -> None:
    modules = _modules_of(f"lathe.{name}")
    assert _loaded_by(f"import {', '.join(modules)}", _HEAVY) == []


def test_importing_lathe_loads_nothing_heavy() -> None:
    assert _loaded_by("import lathe", (*_HEAVY, "numpy", "rich", "typer", "huggingface_hub")) == []


def test_help_imports_no_more_than_the_words_it_shows() -> None:
    statement = "from lathe.cli.main import main\nassert main(['--help']) == 0"
    loaded = _loaded_by(statement, (*_HEAVY, "numpy", "rich.console"))
    assert [name for name in _HEAVY if name in loaded] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_cheap_module_with_a_command(verb: str) -> None:
    statement = f"import importlib\nassert importlib.import_module({VERBS[verb]!r}).command.__doc__ != ''"
    assert _loaded_by(statement, _HEAVY) == []


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(lathe.__path__[0]) / "py.typed").is_file()
