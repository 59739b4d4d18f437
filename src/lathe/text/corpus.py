"""The text that a tokenizer is trained on: lines, from files or from any iterable of strings.

A file that is not UTF-8 is refused, with the place, instead of being read with replacement characters that would
then stand in the vocabulary.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from lathe.errors import RequestError

Corpus = os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[str] | Iterable[os.PathLike[str]]


def read_lines(corpus: Corpus) -> Iterator[str]:
    """The lines of a corpus, each with its end of line; lines without a visible character are left out.

    Args:
        corpus: texts; or the path of a UTF-8 file, or several. A path is a `Path`: a string is text.

    Raises:
        RequestError: a file that is missing or not UTF-8 (names the line and the byte), something that is neither
            a text nor a path, no text at all.
    """
    if isinstance(corpus, str):
        raise RequestError("the corpus is one string: pass a list of texts, or a pathlib.Path for a file")
    parts: Iterable[str | os.PathLike[str]] = [corpus] if isinstance(corpus, os.PathLike) else corpus
    found = False
    files: list[str] = []
    for number, part in enumerate(parts):
        if isinstance(part, os.PathLike):
            files.append(os.fspath(part))
        for line in _lines(part, number):
            if line.strip():
                found = True
                yield line
    if not found:
        named = f" ({', '.join(files[:3])}{', …' if len(files) > 3 else ''})" if files else ""
        raise RequestError(f"the corpus{named} is empty: there is no text to train a tokenizer on")


def sample(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` lines, each as likely as any other, in their order; all of them if there are no more.

    One pass, and no more memory than the sample takes (Vitter 1985, algorithm R).
    """
    generator = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        if number < count:
            kept.append((number, line))
            continue
        place = generator.randrange(number + 1)
        if place < count:
            kept[place] = (number, line)
    return [line for _, line in sorted(kept)]


def _lines(part: str | os.PathLike[str], number: int) -> Iterator[str]:
    if isinstance(part, str):
        _require_unicode(part, number)
        yield from part.splitlines(keepends=True)
    elif isinstance(part, os.PathLike):
        yield from _file_lines(Path(part))
    else:
        raise RequestError(f"text {number} of the corpus is {type(part).__name__} {part!r:.60}: expected a string")


def _file_lines(path: Path) -> Iterator[str]:
    start = 0
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                try:
                    yield data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    at = start + error.start
                    raise RequestError(
                        f"{path} is not UTF-8: line {number}, byte {at} of the file is 0x{data[error.start]:02x}; "
                        "convert it to UTF-8 first"
                    ) from error
                start += len(data)
    except OSError as error:
        raise RequestError(f"cannot read the corpus {path}: {error.strerror}") from error


def _require_unicode(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text {number} of the corpus holds {text[error.start]!r} at position {error.start}, half of a surrogate "
            "pair: it was decoded wrongly, so read it again as UTF-8"
        ) from error
