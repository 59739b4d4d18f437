"""Every kind of file gives its records, and every kind of damage one line with the file and the place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lathe.data import read
from lathe.errors import LatheError, RequestError

RECORDS = [{"text": "안녕, 세계", "label": "1"}, {"text": 'a "quoted" word', "label": "0"}]
BOTH = {"text": "text", "label": "label"}


def written(folder: Path, name: str) -> Path:
    """The two records as a file of the kind that the name says."""
    path = folder / name
    kind = name.removesuffix(".gz").rsplit(".")[-1]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        data = path.read_bytes()
    elif kind == "jsonl":
        data = "\n".join(json.dumps(record) for record in RECORDS).encode()
    elif kind == "csv":
        data = 'text,label\n"안녕, 세계",1\r\n"a ""quoted"" word",0\n'.encode()
    else:
        rows = "".join(f"{record['text']}\t{record['label']}\r\n" for record in RECORDS)
        data = f"text\tlabel\r\n{rows}".encode("utf-8-sig")
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_each_format_gives_its_records_also_packed(tmp_path: Path, kind: str, end: str):
    path = written(tmp_path, f"data.{kind}{end}")
    assert list(read(path, fields=BOTH)) == RECORDS
    assert list(read(str(path), fields={"source": "label"})) == [{"source": "1"}, {"source": "0"}]


def test_lines_and_paragraphs(tmp_path: Path):
    path = tmp_path / "data.txt"
    path.write_text("one\n  \ntwo\u2028still two\nthree", encoding="utf-8")
    assert [record["text"] for record in read(path)] == ["one", "two\u2028still two", "three"]
    texts = [record["text"] for record in read(path, format="paragraphs")]
    assert texts == ["one", "two\u2028still two\nthree"]


def test_numbers_become_text(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": "", "label": true}\n')
    assert list(read(path, fields=BOTH)) == [{"text": "a", "label": "1"}, {"text": "", "label": "1"}]


def test_a_cell_of_a_csv_may_be_a_book(tmp_path: Path):
    book = "word " * 30_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{book}",1\n', encoding="utf-8")
    assert list(read(tmp_path / "a.csv")) == [{"text": book}]


@pytest.mark.parametrize("stream", [False, True])
def test_what_datasets_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    written(folder, "train.jsonl")
    assert list(read(folder, fields=BOTH, stream=stream)) == RECORDS
    with pytest.raises(RequestError, match="record 1: there is no column 'words'; it has text, label"):
        list(read(folder, fields={"text": "words"}, stream=stream))
    with pytest.raises(RequestError, match=r"cannot open the dataset .*split nowhere"):
        list(read(folder, split="nowhere", stream=stream))


@pytest.mark.parametrize(
    ("name", "data", "kind", "words"),
    [
        ("a.txt", b"", RequestError, "a.txt holds no record"),
        ("a.txt.gz", gzip.compress(b"\n\n", mtime=0), RequestError, "a.txt.gz holds no record"),
        ("a.tsv", b"text\tlabel\n", RequestError, "a.tsv holds no record"),
        ("a.txt", b"fine\nnot \xff\xfe\n", RequestError, r"a.txt, line 2: not UTF-8 \(byte 5 of the line is 0xff\)"),
        (
            "a.txt.gz",
            gzip.compress(b"one\n" * 9000, mtime=0)[:-20],
            LatheError,
            "a.txt.gz is damaged after line .* ends early",
        ),
        ("a.txt.gz", gzip.compress(b"\xff", mtime=0), RequestError, "line 1: not UTF-8 .* the archive may be damaged"),
        ("a.txt.gz", gzip.compress(b"one\n", mtime=0)[:-8] + bytes(8), LatheError, "a.txt.gz .* damaged .*CRC"),
        ("a.txt.gz", b"one\n", LatheError, "a.txt.gz is no gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', RequestError, "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', RequestError, "a.jsonl, line 2: a list; expected one JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', RequestError, "line 2: there is no column 'text'; it has txt"),
        ("a.jsonl", b'{"text": null}', RequestError, "line 1: the column 'text' has no value"),
        ("a.jsonl", b'{"text": ["b"]}', RequestError, "line 1: the column 'text' holds a list"),
        ("a.tsv", b"text\tlabel\na\t1\nb\n", RequestError, r"line 3: 1 columns; the header has 2 \(text, label\)"),
        ("a.tsv", b"text\tlabel\n\t1\n", RequestError, "line 2: the column 'text' has no value"),
        ("a.tsv", b"text\ttext\na\tb\n", RequestError, "line 1: the header names 'text' twice"),
        ("a.csv", b'text,label\na,1\n"b,1\n', RequestError, "line 3: not CSV"),
        ("a.csv", b"words,label\na,1\n", RequestError, "line 2: there is no column 'text'; it has words, label"),
        ("a.parquet", b"PAR1 nothing", LatheError, "a.parquet is no Parquet file"),
        ("a.xml", b"<a/>", RequestError, r"what kind of file is \.xml\? expected \.txt"),
        ("a", b"text", RequestError, "one without a suffix"),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, name: str, data: bytes, kind: type[Exception], words: str):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(kind, match=words) as raised:
        list(read(path))
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


def test_a_path_that_leads_nowhere_and_a_format_that_is_none(tmp_path: Path):
    with pytest.raises(RequestError, match="there is no file"):
        read(tmp_path / "a.txt")
    with pytest.raises(RequestError, match="there is no file"):
        read("reviews.tsv.gz")
    with pytest.raises(RequestError, match="unknown format 'xml': expected one of lines, paragraphs"):
        read(tmp_path / "a.txt", format="xml")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(RequestError, match=r"are for datasets, and .* is a file; leave them out"):
        read(tmp_path / "b.txt", split="valid")
    with pytest.raises(RequestError, match="format='tsv' is for files"):
        read(tmp_path, format="tsv")
