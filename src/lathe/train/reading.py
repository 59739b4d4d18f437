"""The data that a request names, as the token ids that its objective reads."""

from __future__ import annotations

from pathlib import Path

from lathe.data.corpus import Corpus
from lathe.data.tokenise import tokenise
from lathe.errors import RequestError
from lathe.objectives.base import Objective
from lathe.text.corpus import read_lines
from lathe.text.tokenizer import Tokenizer


def corpus(file: str, tokenizer: Tokenizer, made: Objective) -> Corpus:
    """The documents of a file, one a line.

    Raises:
        RequestError: no such file, nothing in it, or an objective that needs more than text.
    """
    if tuple(made.reads) != ("text",):
        raise RequestError(f"the objective {made.name} reads {', '.join(made.reads)}; {file} holds lines of text")
    return tokenise(tokenizer, (line.rstrip("\r\n") for line in read_lines(Path(file))))
