"""Text as lines, from files or from any iterable of strings: what a tokenizer is trained on, what a model reads.

A file that is not UTF-8 is refused, with the place, instead of being read with replacement characters that would
then stand in the vocabulary. One whose name ends in .gz is unpacked on the way.
"""

from __future__ import annotations

import gzip
import os
import random
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path

from lathe.errors import LatheError, RequestError

Corpus = os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[str] | Iterable[os.PathLike[str]]


def read_lines(corpus: Corpus) -> Iterator[str]:
    """The lines of a corpus, each with its end of line; lines without a visible character are left out.

    Args:
        corpus: texts; or the path of a UTF-8 file, or several. A path is a `Path`: a string is text.

    Raises:
        RequestError: a file that is missing or not UTF-8 (names the line and the byte), something that is neither
            a text nor a path, no text at all.
        LatheError: an archive that is damaged.
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
        named = f"{', '.join(files[:3])}{', …' if len(files) > 3 else ''}" if files else "the corpus"
        raise RequestError(f"{named} is empty: expected at least one line of text")


def read_every_line(path: Path) -> list[str]:
    """The lines of a file without their ends, for an answer to each: the first answer is the first line's.

    Raises:
        RequestError: as `read_lines`, and a line without a visible character, by its number.
    """
    lines = [line.rstrip("\r\n") for line in _file_lines(path)]
    if not any(line.strip() for line in lines):
        raise RequestError(f"{path} is empty: expected at least one line of text")
    blank = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
    if blank is not None:
        raise RequestError(
            f"{path}, line {blank} is blank, and each line has an answer of its own: expected a text in every line; "
            "take the line out, or write something into it"
        )
    return lines


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
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from decoded(file, str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LatheError(f"{path} is no gzip file, or is damaged ({error}); copy or download it again") from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Lines of bytes as text; a byte order mark before the first says how it is written, and is not part of it.

    Raises:
        RequestError: a line is not UTF-8. `name` says where the lines are from.
    """
    for number, data in enumerate(lines, start=1):
        mark = len(BOM_UTF8) if number == 1 and data.startswith(BOM_UTF8) else 0
        try:
            yield data[mark:].decode("utf-8")
        except UnicodeDecodeError as error:
            at = mark + error.start
            raise RequestError(
                f"{name} is not UTF-8: line {number}, byte {at + 1} of the line is 0x{data[at]:02x}; "
                "convert it with iconv -t UTF-8"
            ) from error


def _require_unicode(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text {number} of the corpus holds {text[error.start]!r} at position {error.start}, half of a surrogate "
            "pair: it was decoded wrongly, so read it again as UTF-8"
        ) from error
