"""Real English text that every CPython carries: its documentation topics and the standard library's docstrings.

Nothing is downloaded and nothing is run: sources are parsed, not imported. One document is one topic, or all the
docstrings of one module. Every tenth document is kept for validation, so no document is in both parts.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from lathe.errors import LatheError

# Folders that hold tests, generated tables or other people's packages.
_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "ensurepip", "encodings"}
)
_VALIDATION_EVERY = 10
_SHORTEST = 200  # characters; a document below it says little


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to validate on."""

    train: list[str]
    validation: list[str]

    @property
    def characters(self) -> int:
        """How many characters there are to train on."""
        return sum(len(document) for document in self.train)


def python_corpus() -> Corpus:
    """The text, in an order that depends on nothing but the Python that runs.

    Raises:
        LatheError: this Python was installed without its sources.
    """
    documents = [*_topics(), *_docstrings()]
    # The library holds copies of some modules: each text counts once, or it could stand in both parts.
    documents = [text for text in dict.fromkeys(documents) if len(text) >= _SHORTEST]
    if len(documents) < 2 * _VALIDATION_EVERY:
        raise LatheError("this Python carries no library sources to read; use one that was installed with them")
    validation = documents[::_VALIDATION_EVERY]
    train = [text for number, text in enumerate(documents) if number % _VALIDATION_EVERY]
    return Corpus(train, validation)


def _topics() -> list[str]:
    """The reference's own text, as `help()` shows it."""
    from pydoc_data.topics import topics

    return [_tidy(text) for _, text in sorted(topics.items())]


def _docstrings() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    return [text for path in sorted(files, key=lambda path: path.relative_to(root).parts) if (text := _of_module(path))]


def _of_module(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old string escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""  # a template or a file meant to be broken
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, nodes)]
    return "\n\n".join(_tidy(text) for text in found if text)


def _tidy(text: str) -> str:
    """Paragraphs on one line each, without the rulers and indents of reStructuredText."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    lines = (" ".join(line.strip(" *=-~^") for line in paragraph.splitlines()).strip() for paragraph in paragraphs)
    return "\n".join(line for line in lines if line)
