"""What a text uses of a vocabulary: how often each piece stands in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from lathe.errors import RequestError
from lathe.text.conventions import SPACE
from lathe.text.corpus import Corpus, read_lines
from lathe.text.tokenizer import Tokenizer

_AT_ONCE = 1024  # texts
_MOST_UNKNOWN = 0.5


@dataclass(frozen=True)
class Use:
    """How often each id stands in a text.

    Attributes:
        unknown: the share of the text's pieces, bare spaces apart, that are unknown to the tokenizer.
    """

    counts: Mapping[int, int]
    unknown: float

    @property
    def total(self) -> int:
        """How many pieces the text has."""
        return sum(self.counts.values())


def use_of(tokenizer: Tokenizer, corpus: Corpus) -> Use:
    """Read a corpus and count its pieces.

    Args:
        corpus: texts, or the `Path` of a UTF-8 file, or several. A text is read whole, a file line by line.

    Raises:
        RequestError: an empty corpus, text that is not UTF-8, or one that the tokenizer reads as mostly unknown.
    """
    return counted(_counts(tokenizer, iter_texts(corpus)), tokenizer)


def unknown_share(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """The share of the texts' pieces, bare spaces apart, that are unknown to the tokenizer, 0 to 1."""
    return _unknown(tokenizer, _counts(tokenizer, texts))


def _counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    left = iter(texts)
    while group := list(islice(left, _AT_ONCE)):
        for ids in tokenizer.encode_batch(group, add_special_tokens=False):
            counts.update(ids)
    return counts


def _unknown(tokenizer: Tokenizer, counts: Mapping[int, int]) -> float:
    unknown, space = tokenizer.unk_id, tokenizer.token_id(SPACE)
    # GPT-2's end of text is its unknown token as well, and byte-level pieces leave nothing unknown.
    if unknown is None or tokenizer.spells_bytes:
        return 0.0
    # A bare space stands before each word that is unknown, and says nothing by itself.
    said = sum(counts.values()) - (0 if space is None else counts.get(space, 0))
    return counts.get(unknown, 0) / max(said, 1)


def counted(counts: Mapping[int, int], tokenizer: Tokenizer) -> Use:
    """Counts of ids as use, if the tokenizer knows enough of the text.

    Raises:
        RequestError: the text is empty, or mostly unknown.
    """
    if not sum(counts.values()):
        raise RequestError("the corpus is empty: normalisation leaves none of its characters")
    share = _unknown(tokenizer, counts)
    if share > _MOST_UNKNOWN:
        raise RequestError(
            f"the tokenizer reads {share:.0%} of the corpus as unknown: expected text of the kind that the model was "
            "trained on; check the file's language and encoding, or grow the vocabulary first"
        )
    return Use(dict(counts), share)


def iter_texts(corpus: Corpus) -> Iterator[str]:
    """The texts of a corpus: a text as it is, a file line by line; none that holds no visible character.

    Raises:
        RequestError: as `read_lines`.
    """
    if isinstance(corpus, str):
        raise RequestError("the corpus is one string: pass a list of texts, or a pathlib.Path for a file")
    parts: Iterable[str | os.PathLike[str]] = [corpus] if isinstance(corpus, os.PathLike) else corpus
    found = False
    for part in parts:
        lines = iter([part]) if isinstance(part, str) else (line.rstrip("\r\n") for line in read_lines([part]))
        for text in lines:
            if text.strip():
                found = True
                yield text
    if not found:
        raise RequestError("the corpus is empty: there is no text to count pieces in")
