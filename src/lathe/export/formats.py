"""The formats there are, by the name that `--to` takes; each module is imported when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from lathe.errors import RequestError
from lathe.export.base import Format, Package
from lathe.spec import unknown

MODULES: dict[str, str] = {
    "gguf": "lathe.export.gguf_format",
    "ctranslate2": "lathe.export.ctranslate2_format",
    "onnx": "lathe.export.onnx_format",
}


def format_of(name: str) -> Format:
    """The format of that name; an unknown one is a `RequestError` that names those there are."""
    if name not in MODULES:
        raise RequestError(unknown("format", name, MODULES))
    found: Format = importlib.import_module(MODULES[name]).FORMAT
    return found


def missing(packages: Sequence[Package]) -> list[Package]:
    """Those of the packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package.module) is None]


def pip_line(packages: Sequence[Package]) -> str:
    """The command that installs them."""
    return "pip install " + " ".join(package.pip for package in packages)
