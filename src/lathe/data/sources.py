"""Documents from files and from the `datasets` library, as records: column name to text.

    read("reviews.tsv.gz", fields={"text": "document", "label": "label"})

What a file is follows from its name, and `format` overrides it; `.gz` behind any of them is unpacked on the way.

    lines       .txt, .text           one document a line; its one column is `text`
    paragraphs  (by `format` alone)   documents apart by blank lines; `text`
    jsonl       .jsonl, .ndjson       one JSON object a line
    tsv         .tsv                  a header, then one record a line; no quoting
    csv         .csv                  a header, then records with the usual quoting
    parquet     .parquet              a table of columns

What is no file is a name for `datasets.load_dataset`: a dataset of the hub, or a directory.

Files are read one record at a time, as UTF-8, strictly: a byte that is not, a column that is not there, a value that
is missing, an archive that ends early are each an error that names the file and the line. A source that ends
without a record is an error too.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lathe.errors import LatheError, RequestError
from lathe.spec import unknown

_LONGEST_CELL = 2**30  # characters of a CSV's cell: a book, and not the 128 KiB that Python allows
_SUFFIXES = {
    ".txt": "lines",
    ".text": "lines",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".parquet": "parquet",
}
Row = Mapping[str, Any]


def read(
    source: str | os.PathLike[str],
    *,
    fields: Mapping[str, str] | None = None,
    format: str | None = None,
    split: str | None = None,
    config: str | None = None,
    stream: bool = False,
) -> Iterator[dict[str, str]]:
    """The records of a source, in its order.

    Args:
        source: the path of a file, or what `datasets.load_dataset` opens.
        fields: what to call which column: `{"source": "en", "target": "ko"}`; `{"text": "text"}` where left out.
        format: how to read the file; by its name where left out.
        split, config, stream: for `datasets` alone: which part (`train` where left out), which configuration, and
            whether to download as it goes.

    Raises:
        RequestError: no such source, no such format or column, text that is not UTF-8, no record at all.
        LatheError: the file is damaged. Both name the file, and the line where there is one.
    """
    wanted = dict(fields or {"text": "text"})
    path = Path(source).expanduser()
    if format is not None and format not in _READERS:
        raise RequestError(unknown("format", format, _READERS))
    if path.is_file():
        if split is not None or config is not None or stream:
            raise RequestError(f"split, config and stream are for datasets, and {path} is a file; leave them out")
        rows = _READERS[format or _format(path)](path)
    elif _looks_like_a_file(source, path):
        raise RequestError(f"there is no file {path}; give the path of a file, or the name of a dataset")
    else:
        if format is not None:
            raise RequestError(f"format={format!r} is for files, and {source} is none; leave it out")
        rows = _dataset(os.fspath(source), split or "train", config, stream)
    return _selected(rows, wanted, os.fspath(source))


def _format(path: Path) -> str:
    suffix = _named(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise RequestError(
            f"{path}: what kind of file is {suffix or 'one without a suffix'}? expected "
            f"{', '.join(_SUFFIXES)}, each also with .gz; or give format, one of {', '.join(_READERS)}"
        )
    return _SUFFIXES[suffix]


def _named(path: Path) -> Path:
    """The path without `.gz`."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def _looks_like_a_file(source: str | os.PathLike[str], path: Path) -> bool:
    if path.is_dir():
        return False
    return not isinstance(source, str) or source[:1] in "/.~" or _named(path).suffix.lower() in _SUFFIXES


def _selected(rows: Iterable[tuple[str, Row]], wanted: Mapping[str, str], source: str) -> Iterator[dict[str, str]]:
    """The wanted columns of each row, which comes with the words that say where it stands."""
    found = False
    for where, row in rows:
        found = True
        yield {name: _text(row, column, where) for name, column in wanted.items()}
    if not found:
        raise RequestError(f"{source} holds no record; give a file that holds some")


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise RequestError(f"{where}: there is no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    value = row[column]
    if isinstance(value, str):
        return value
    if value is None:
        raise RequestError(f"{where}: the column {column!r} has no value; fill it in, or leave the record out")
    if isinstance(value, int | float):
        return str(int(value)) if isinstance(value, bool) else str(value)
    raise RequestError(f"{where}: the column {column!r} holds a {type(value).__name__}; expected text or a number")


# --- text files ----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, unpacked; what the archive or the disk says becomes one line."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast("IO[bytes]", file)
    except gzip.BadGzipFile as error:
        raise LatheError(f"{path} is no gzip file, or is damaged ({error}); copy or download it again") from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines without their ends."""
    number = 0
    with _opened(path) as file:
        try:
            for number, data in enumerate(file, start=1):
                try:
                    line = data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    damaged = ", or copy it again: the archive may be damaged" if path.suffix.lower() == ".gz" else ""
                    raise RequestError(
                        f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line is "
                        f"0x{data[error.start]:02x}); convert the file to UTF-8{damaged}"
                    ) from error
                yield number, line.rstrip("\r\n")
        except (EOFError, zlib.error) as error:
            raise LatheError(
                f"{path} is damaged after line {number}: the archive ends early or is broken; copy or download it again"
            ) from error


def _documents(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}, line {number}", {"text": line}


def _paragraphs(path: Path) -> Iterator[tuple[str, Row]]:
    first, held = 1, list[str]()
    for number, line in _lines(path):
        if line.strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield f"{path}, line {first}", {"text": "\n".join(held)}
            held = []
    if held:
        yield f"{path}, line {first}", {"text": "\n".join(held)}


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: not JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise RequestError(f"{where}: a {type(row).__name__}; expected one JSON object a line")
        yield where, row


def _tsv(path: Path) -> Iterator[tuple[str, Row]]:
    header: list[str] | None = None
    for number, line in _lines(path):
        cells = line.split("\t")
        if header is None:
            header = _header(f"{path}, line {number}", cells)
        elif line.strip():
            yield _row(f"{path}, line {number}", header, cells)


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))  # of the process; there is no other
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = _header(f"{path}, line {reader.line_num}", cells)
            elif cells:
                yield _row(f"{path}, line {reader.line_num}", header, cells)
    except csv.Error as error:
        raise RequestError(f"{path}, line {reader.line_num}: not CSV ({error}); correct that line") from error


def _header(where: str, cells: list[str]) -> list[str]:
    twice = [name for name in cells if cells.count(name) > 1]
    if twice:
        raise RequestError(f"{where}: the header names {twice[0]!r} twice; give each column a name of its own")
    return cells


def _row(where: str, header: list[str], cells: list[str]) -> tuple[str, Row]:
    if len(cells) != len(header):
        raise RequestError(f"{where}: {len(cells)} columns; the header has {len(header)} ({', '.join(header)})")
    # An empty cell is a missing value: a table of text has no other way to say so.
    return where, {name: cell or None for name, cell in zip(header, cells)}


# --- tables and datasets -------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".gz":
            with _opened(path) as file:
                table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()))
        else:
            table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for group in table.iter_batches():
            for row in group.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        raise LatheError(f"{path} is no Parquet file, or is damaged ({_line(error)}); copy it again") from error


def _dataset(name: str, split: str, config: str | None, stream: bool) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, streaming=stream)
        for number, row in enumerate(data, start=1):
            yield f"{name} ({split}), record {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RequestError(f"cannot open the dataset {name}, split {split}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    "lines": _documents,
    "paragraphs": _paragraphs,
    "jsonl": _jsonl,
    "tsv": _tsv,
    "csv": _csv,
    "parquet": _parquet,
}
