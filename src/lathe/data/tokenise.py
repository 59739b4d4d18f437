"""Records to a corpus of token ids, and the special tokens that objectives ask for.

Every field of a record is text and becomes a field of the corpus, but for `label`, which becomes a class number:
its place in `labels`, where these are given, else the number that it says.

`breaks` finds the lines, paragraphs or sentences of each `text` and keeps at which token each ends, for the objectives
that exchange sentences. The tokens are those of the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lathe.architecture import Architecture
from lathe.data.corpus import Corpus
from lathe.data.segments import check_kind, segment_spans
from lathe.data.words import continuing, frame
from lathe.errors import RequestError
from lathe.objectives.base import SpecialTokens
from lathe.text.tokenizer import Tokenizer

_RECORDS_AT_ONCE = 1024
TEXT, BREAKS, LABEL = "text", "breaks", "label"
Rows = list[list[int]]


def tokenise(tokenizer: Tokenizer, texts: Iterable[str], *, breaks: str | None = None) -> Corpus:
    """A corpus of one field, `text`, in memory: a document for each text, without special tokens.

    Args:
        breaks: `line`, `paragraph` or `sentence`: keep where these end.

    Raises:
        RequestError: there is no text, or one that is no string or not valid Unicode.
    """
    return tokenise_records(tokenizer, ({TEXT: text} for text in texts), breaks=breaks)


def tokenise_records(
    tokenizer: Tokenizer,
    records: Iterable[Mapping[str, str]],
    *,
    breaks: str | None = None,
    labels: Sequence[str] | None = None,
) -> Corpus:
    """A corpus of all fields of the records, in memory.

    Raises:
        RequestError: there is no record, one has other fields than the first, or a label that names no class.
    """
    rows: dict[str, Rows] = {}
    for chunk in Encoder(tokenizer, breaks, labels).chunks(records):
        for name, more in chunk.items():
            rows.setdefault(name, []).extend(more)
    if not rows:
        raise RequestError("the data holds no document; give a file that holds some")
    classes = rows.pop(LABEL, None)
    return Corpus.of(
        tokenizer.vocab_size,
        breaks=rows.pop(BREAKS, None),
        labels=None if classes is None else np.array(classes, dtype=np.int64)[:, 0],
        **rows,
    )


@dataclass(frozen=True)
class Encoder:
    """Makes token ids of records; see the module."""

    tokenizer: Tokenizer
    breaks: str | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.breaks is not None:
            check_kind(self.breaks)

    def chunks(self, records: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Rows]]:
        """The rows of about a thousand records at a time, field by field; a label is a row of one number."""
        source, fields, done = iter(records), None, 0
        while group := list(islice(source, _RECORDS_AT_ONCE)):
            fields = fields or tuple(group[0])
            for number, record in enumerate(group, start=done + 1):
                if tuple(record) != fields:
                    raise RequestError(
                        f"record {number} has the fields {', '.join(record)} and the first one {', '.join(fields)}; "
                        "give all records the same fields"
                    )
            yield self._encoded(group, fields, done)
            done += len(group)

    def _encoded(self, group: list[Mapping[str, str]], fields: tuple[str, ...], done: int) -> dict[str, Rows]:
        made: dict[str, Rows] = {}
        for name in fields:
            texts = [record[name] for record in group]
            if name == LABEL:
                made[name] = [[self._class(text, done + i)] for i, text in enumerate(texts, start=1)]
            elif name == TEXT and self.breaks is not None:
                made[TEXT], made[BREAKS] = self._by_segment(texts, self.breaks)
            else:
                made[name] = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        if self.breaks is not None and BREAKS not in made:
            raise RequestError(
                f"breaks={self.breaks!r} is for the field {TEXT!r}; the records have {', '.join(fields)}"
            )
        return made

    def _by_segment(self, texts: list[str], kind: str) -> tuple[Rows, Rows]:
        """The ids of whole texts, so that what stands between segments stays, and where each segment ends in them.

        White space between two is of the second one: many tokenizers mark the beginning of a word by it.
        """
        tokens: Rows = []
        ends: Rows = []
        for text, (ids, spans) in zip(texts, self.tokenizer.encode_spans(texts), strict=True):
            stops = [stop for _, stop in segment_spans(text, kind)]
            starts = np.maximum.accumulate([start for start, _ in spans], dtype=np.int64)
            tokens.append(ids if stops else [])
            ends.append([*np.searchsorted(starts, stops[:-1]).tolist(), len(ids)] if stops else [])
        return tokens, ends

    def _class(self, label: str, number: int) -> int:
        if self.labels is not None:
            if label not in self.labels:
                raise RequestError(f"record {number}: label {label!r}; expected one of {', '.join(self.labels)}")
            return self.labels.index(label)
        try:
            return int(label)
        except ValueError:
            raise RequestError(
                f"record {number}: label {label!r} is no class number; give labels, the names in their order"
            ) from None


def special_tokens(tokenizer: Tokenizer, architecture: Architecture) -> SpecialTokens:
    """The special tokens of a tokenizer, with the model's own start token for its decoder.

    Raises:
        RequestError: the tokenizer has more tokens than the model's vocabulary.
    """
    vocab = architecture.embedding.vocab_size
    if tokenizer.vocab_size > vocab:
        raise RequestError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model's vocabulary is {vocab:,}; "
            "use the model's own tokenizer, or a larger vocab_size"
        )
    front, middle, back = frame(tokenizer) or (None, None, None)
    return SpecialTokens(
        vocab_size=tokenizer.vocab_size,
        pad=tokenizer.pad_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        cls=tokenizer.cls_id,
        sep=tokenizer.sep_id,
        mask=tokenizer.mask_id,
        sentinels=tokenizer.sentinels,
        decoder_start=architecture.tokens.decoder_start,
        reserved=tuple(sorted(tokenizer.special_ids)),
        continues=continuing(tokenizer),
        front=front,
        middle=middle,
        back=back,
        token_types=tokenizer.uses_token_types and architecture.embedding.token_types > 1,
    )
