"""The files of a tokenizer: which they are, reading them, writing them.

A tokenizer is held as the bytes of its files, so what was loaded is saved unchanged, down to chat templates and
whatever other programs read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lathe.errors import RequestError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
VOCAB_TEXT = "vocab.txt"
VOCAB_JSON = "vocab.json"
MERGES = "merges.txt"
MODEL_CONFIG = "config.json"  # the model's, which is not the tokenizer's to keep
PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")

# Each of these alone makes a directory one with a tokenizer.
VOCABULARIES = (TOKENIZER, *PIECES, VOCAB_TEXT, VOCAB_JSON)
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (*VOCABULARIES, MERGES, CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE, "chat_template.json")
TEMPLATES = "additional_chat_templates"

_LFS_START = b"version https://git-lfs"


def is_in(directory: Path) -> bool:
    """Whether the directory holds a tokenizer's vocabulary."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def read(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory, by name.

    Raises:
        RequestError: no such directory, no vocabulary in it, or a file that was not downloaded.
    """
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise RequestError(f"{directory} {what}: give a directory that holds one of {', '.join(VOCABULARIES)}")
    if not is_in(directory):
        raise RequestError(f"{directory} holds no tokenizer: expected one of {', '.join(VOCABULARIES)}")
    paths = [directory / name for name in FILES]
    paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    files = {path.relative_to(directory).as_posix(): _read(path) for path in paths if path.is_file()}
    for name, data in files.items():
        if data.startswith(_LFS_START):
            raise RequestError(f"{directory / name} is a Git LFS pointer: run `git lfs pull` there")
    return files


def write(files: Mapping[str, bytes], directory: Path) -> None:
    """Write the files into a directory, which is made if need be.

    Raises:
        RequestError: another tokenizer is there already, or the directory cannot be written to.
    """
    try:
        _refuse_another(files, directory)
        for name, data in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise RequestError(f"cannot write to {directory}: {error.strerror}; choose another place") from error


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        RequestError: the file is not JSON, or not an object.
    """
    if name not in files:
        return {}
    try:
        content = json.loads(files[name].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not readable JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise RequestError(f"{name} holds a {type(content).__name__}: expected a JSON object")
    return content


def to_json(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file, readable and always the same for the same content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def _refuse_another(files: Mapping[str, bytes], directory: Path) -> None:
    """A vocabulary that stays behind beside the new one would be somebody's surprise."""
    for name in FILES:
        path = directory / name
        if path.is_file() and _read(path) != files.get(name):
            raise RequestError(f"{directory} already holds another tokenizer ({name}): choose another directory")
