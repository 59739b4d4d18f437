"""The text that a cut is fitted on, and the text that it is measured on, as batches.

A file is anything that `lathe.data.read` opens. What a model is shown of it is what it was trained to be shown: its
objective follows from its stacks and its head, and masks or corrupts the text as the training did, because the
statistics of unmasked text are not those that the model runs on.

A model that answers, translates or summarises was trained on pairs: `source` and `target` name their columns, `prefix`
the words that stand before each source, and what the decoder is shown are the targets.

Documents are drawn at random, as the seed says, until there are enough tokens: files are often sorted. Where no other
text is given to measure on, every tenth of them is kept apart for that and fits nothing. The text is known by the
SHA-256 of the documents that were used.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch import Tensor

from lathe.architecture import Architecture
from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.data.corpus import Corpus
from lathe.data.sources import read
from lathe.data.tokenise import special_tokens
from lathe.errors import RequestError
from lathe.objectives.base import Objective
from lathe.objectives.by_name import objective
from lathe.objectives.causal import Causal
from lathe.reshape.vocabulary import LARGEST_MULTIPLE, Vocabulary
from lathe.spec import Spec, size
from lathe.text.conventions import SPACE
from lathe.text.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 64
_MOST_CHARACTERS = 200_000_000  # of a file, among which documents are drawn
_TOO_LONG = 0.8  # a document is cut where less than this share of it is still needed
_APART_EVERY = 10  # of the documents, where one file has to serve for both
_LONGEST_ROW = 256
_PAIR = ("source", "target")
_MOST_UNREAD = 0.5  # of the tokens
# Where sentences end is not kept of plain text, so they stay in their order.
_PLAIN: Mapping[str, Mapping[str, Any]] = {"denoising": {"permute": False}}


@dataclass(frozen=True, kw_only=True)
class TextSettings(Spec):
    """Which text, how much of it, and how it is laid into rows."""

    file: str
    field: str = "text"  # the column, where the file has several
    format: str | None = None  # by the file's name
    tokens: int = size(2**40, default=65_536)  # as many as there are, where there are fewer
    length: int | None = size(2**24, least=8, default=None)  # positions of a row; 256, or what the model has
    rows: int = size(2**20, default=16)  # in a batch
    seed: int = size(2**32 - 1, least=0, default=0)  # of what the objective hides
    source: str | None = None  # of pairs: the column that is read
    target: str | None = None  # and the column that is written
    prefix: str = ""  # what stands before each source

    def check(self) -> None:
        require_pair(self.field, self.source, self.target, self.prefix)

    @property
    def columns(self) -> dict[str, str]:
        """What is read of each record: name to column."""
        if self.source is None or self.target is None:
            return {"text": self.field}
        return {"source": self.source, "target": self.target}


def require_pair(field: str, source: str | None, target: str | None, prefix: str) -> None:
    """Refuse half of a pair.

    Raises:
        RequestError: a source without a target or the other way round, a prefix or a text's column beside them.
    """
    if (source is None) != (target is None):
        raise RequestError(f"source={source} and target={target}: pairs have both; give the other, too")
    if source is None and prefix:
        raise RequestError(f"prefix={prefix!r}: it stands before the source of a pair; give source and target")
    if source is not None and field != "text":
        raise RequestError(f"field={field} beside source={source}: a pair has no text of its own; give one of them")


Record = tuple[str, ...]  # a text; or a source and its target


@dataclass(frozen=True)
class Documents:
    """Some documents of a source, as text.

    Args:
        texts: in the source's order; of pairs, their sources.
        digest: the SHA-256 of them all.
        targets: of pairs.
        after: what stands before it and a space, where this is one text and a piece of a longer one (`_split`).
        prefix: of pairs, what each source begins with that the file does not hold.
    """

    texts: tuple[str, ...]
    digest: str
    targets: tuple[str, ...] | None = None
    after: str | None = None
    prefix: str = ""

    @classmethod
    def of(cls, texts: Iterable[str], targets: Iterable[str] | None = None) -> Documents:
        """Documents, or pairs, with their digest."""
        kept, wanted = tuple(texts), None if targets is None else tuple(targets)
        hashed = hashlib.sha256()
        for text in (*kept, *(wanted or ())):
            hashed.update(json.dumps(text).encode("ascii") + b"\n")
        return cls(kept, hashed.hexdigest(), wanted)

    @classmethod
    def of_records(cls, records: Sequence[Record], *, pairs: bool) -> Documents:
        """The same from records."""
        return cls.of((each[0] for each in records), [each[1] for each in records] if pairs else None)

    @property
    def records(self) -> list[Record]:
        """Each text; of pairs, source and target."""
        return list(zip(self.texts)) if self.targets is None else list(zip(self.texts, self.targets, strict=True))

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """Their token ids."""
        columns = {"text": self.texts} if self.targets is None else {"source": self.texts, "target": self.targets}
        encoded = {name: tokenizer.encode_batch(list(each), add_special_tokens=False) for name, each in columns.items()}
        return Corpus.of(tokenizer.vocab_size, **encoded)

    @property
    def known(self) -> dict[str, Any]:
        """What a recipe says of them."""
        return {"sha256": self.digest, "documents": len(self.texts)}

    def __bool__(self) -> bool:
        return bool(self.texts)


@dataclass(frozen=True, kw_only=True)
class VocabularySettings(Spec):
    """Which tokens the model shall have, beside their number (`vocab_size=`).

    Args:
        file: text whose tokens are kept, or of which new pieces are learnt; all of it is read.
        words: words that shall be pieces of their own.
        multiple_of: rows are added until their number is a multiple of this.
    """

    file: str | None = None
    field: str = "text"  # the column, where the file has several
    format: str | None = None  # by the file's name
    words: tuple[str, ...] = ()
    multiple_of: int = size(LARGEST_MULTIPLE, default=1)

    def opened(self) -> tuple[Vocabulary, Documents | None]:
        """The request with its text read.

        Raises:
            RequestError: no such file or column, text that is not UTF-8, or none at all.
        """
        if self.file is None:
            return Vocabulary(words=self.words, multiple_of=self.multiple_of), None
        records = read(self.file, fields={"text": self.field}, format=self.format)
        documents = Documents.of(record["text"] for record in records)
        if not documents:
            raise RequestError(f"{self.file} holds no text to see from which tokens are used; give one that holds some")
        return Vocabulary(documents.texts, self.words, multiple_of=self.multiple_of), documents


def read_documents(settings: TextSettings, tokenizer: Tokenizer, *, apart: bool) -> tuple[Documents, Documents]:
    """As many documents as hold `settings.tokens` tokens, and those kept apart to measure on.

    Args:
        apart: keep every tenth document apart; otherwise there are none.

    Raises:
        RequestError: no such file or column, text that is not UTF-8 or that the tokenizer cannot read.
    """
    drawn, pairs = iter(_drawn(settings)), settings.source is not None
    used: list[Record] = []
    held: list[Record] = []
    tokens, number, unread, bare = 0, 0, 0, 0
    space = tokenizer.token_id(SPACE)  # stands alone before what is unknown, and says nothing by itself
    while tokens < settings.tokens and (group := list(islice(drawn, _DOCUMENTS_AT_ONCE))):
        sides = [tokenizer.encode_batch(list(side), add_special_tokens=False) for side in zip(*group, strict=True)]
        for record, ids in zip(group, (list(chain(*each)) for each in zip(*sides, strict=True)), strict=True):
            number += 1
            if apart and number % _APART_EVERY == 0:
                held.append(record)
            elif tokens < settings.tokens:
                unread += ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
                bare += ids.count(space) if space is not None else 0
                share = (settings.tokens - tokens) / max(len(ids), 1)
                used.append(record if pairs else (_cut(record[0], share),))  # half of a pair is none
                tokens += len(ids)
    if unread > _MOST_UNREAD * (tokens - bare):
        raise RequestError(
            f"{settings.file}: the tokenizer cannot read it, {unread / (tokens - bare):.0%} of its tokens are unknown; "
            "give text in the model's own language and script"
        )
    after = None
    if apart and used and not held and pairs:
        used, held = used[:-1] or used, used[1:][-1:]
    elif apart and used and not held:
        used, held, after = _split(used)
    kept_apart = replace(Documents.of_records(held, pairs=pairs), after=after, prefix=settings.prefix)
    return Documents.of_records(used, pairs=pairs), kept_apart


def healing_text(settings: TextSettings, tokenizer: Tokenizer, apart: Documents | None) -> Documents:
    """What is healed on: nothing of what was kept apart to measure on, whatever stands before a pair's source."""
    documents, _ = read_documents(settings, tokenizer, apart=False)
    if apart is None:
        return documents
    held = {_as_filed(record, apart.prefix) for record in apart.records}
    kept = [record for record in documents.records if _as_filed(record, settings.prefix) not in held]
    if documents.targets is None and kept:  # the last document drawn may be cut off, and be the beginning of a held one
        (last,) = kept[-1]
        kept = kept[:-1] if any(text.startswith(last) for (text, *_) in held) else kept
    if apart.after is not None and documents.targets is None:  # half of a pair is none
        kept = [(part,) for (text,) in kept for part in _around(text, apart.after, apart.texts[0])]
    return Documents.of_records(kept, pairs=documents.targets is not None)


def _as_filed(record: Record, prefix: str) -> Record:
    first, *rest = record
    return (first.removeprefix(prefix), *rest)


def _around(text: str, before: str, end: str) -> list[str]:
    """What a document holds around a piece that was kept apart of it; all of it, where it is another document."""
    both = f"{before} {end}"
    if text.startswith(both):
        return [before, rest] if (rest := text[len(both) :]).strip() else [before]
    return [before] if len(text) > len(before) and both.startswith(text) else [text]


def read_all(settings: TextSettings) -> Iterator[Record]:
    """The documents of the file as it holds them.

    Raises:
        RequestError: no such file or column, or text that is not UTF-8.
    """
    for found in read(settings.file, fields=settings.columns, format=settings.format):
        first, *rest = found.values()
        if not rest or first.strip():  # a pair that reads nothing is none
            yield (settings.prefix + first, *rest)


def _drawn(settings: TextSettings) -> list[Record]:
    """The documents of the file, or of its beginning where it is very large, in an order that the seed says."""
    records: list[Record] = []
    characters = 0
    for record in read_all(settings):
        records.append(record)
        characters += sum(map(len, record))
        if characters > _MOST_CHARACTERS:
            break
    random.Random(settings.seed).shuffle(records)
    return records


def _cut(text: str, share: float) -> str:
    """The beginning of a document that is far longer than what is still needed, up to a space if there is one."""
    if share > _TOO_LONG:
        return text
    end = max(int(len(text) * share), 1)
    place = text.rfind(" ", 0, end)
    return text[: place if place > 0 else end]


def _split(texts: list[Record]) -> tuple[list[Record], list[Record], str | None]:
    """Few documents, the last tenth of the longest one, and what stands before that; none apart where it is no text."""
    longest = max(range(len(texts)), key=lambda number: len(texts[number][0]))
    (text,) = texts[longest]
    place = text.rfind(" ", 0, len(text) - len(text) // _APART_EVERY)
    if place < 1 or not text[place:].strip():
        return texts, [], None
    before = text[:place]
    return [*texts[:longest], (before,), *texts[longest + 1 :]], [(text[place + 1 :],)], before


@dataclass(frozen=True)
class Text:
    """Documents as batches for one model.

    Args:
        batches: with labels, where the model has an objective.
        objective: None for a model that predicts no token.
        tokens: of the documents, without marks.
        n_bytes: of the documents, in UTF-8.
        targets_of_text: how many tokens a causal model predicts of them, marks included; None for any other.
    """

    documents: Documents
    batches: list[Batch]
    objective: Objective | None
    length: int
    tokens: int
    n_bytes: int
    targets_of_text: int | None

    @property
    def inputs(self) -> list[Mapping[str, Tensor]]:
        """The keyword arguments of the model, batch by batch."""
        return [batch.inputs for batch in self.batches]


def lay(
    documents: Documents,
    settings: TextSettings,
    architecture: Architecture,
    tokenizer: Tokenizer,
    asked: Mapping[str, Any] | None = None,
) -> Text:
    """The documents as the batches that a model of this architecture is shown.

    Args:
        asked: the objective's name and settings; what the model's head says where left out.

    Raises:
        RequestError: text too short for a row, or an objective that does not fit the model.
    """
    length = row_length(settings, architecture)
    made = _objective(documents, length, architecture, tokenizer, asked)
    corpus = documents.corpus(tokenizer)
    tokens, n_bytes = corpus.n_tokens, sum(len(text.encode()) for record in documents.records for text in record)
    if made is None:
        shown = list(_unlabelled(documents.texts, settings.rows, length, architecture, tokenizer))
        return Text(documents, shown, None, length, tokens, n_bytes, None)
    batches = _batches(corpus, made, length, settings, architecture)
    predicted = None
    if isinstance(made, Causal):
        predicted = tokens + (batches.pieces.n_documents if made.special.eos is not None else 0)
    return Text(documents, batches.one_pass(), made, length, tokens, n_bytes, predicted)


def endless(
    documents: Documents,
    settings: TextSettings,
    architecture: Architecture,
    tokenizer: Tokenizer,
    asked: Mapping[str, Any] | None = None,
) -> Batches:
    """The documents as batches to train on, in a new order each epoch.

    Raises:
        RequestError: a model that predicts no token; as `lay` otherwise.
    """
    length = row_length(settings, architecture)
    made = _objective(documents, length, architecture, tokenizer, asked)
    if made is None:
        raise RequestError("this model predicts no tokens, so text alone cannot heal it; train it with lathe train")
    return _batches(documents.corpus(tokenizer), made, length, settings, architecture)


def _batches(
    corpus: Corpus, made: Objective, length: int, settings: TextSettings, architecture: Architecture
) -> Batches:
    targets = length if tuple(made.reads) == _PAIR else None
    batches = Batches(corpus, made, length=length, target_length=targets, rows=settings.rows, seed=settings.seed)
    batches.fit(architecture)
    return batches


def _objective(
    documents: Documents,
    length: int,
    architecture: Architecture,
    tokenizer: Tokenizer,
    asked: Mapping[str, Any] | None,
) -> Objective | None:
    """What the model is asked on these documents; pairs are their own question, and are shortened to a row."""
    if documents.targets is None:
        return natural_objective(architecture, tokenizer, asked)
    if asked:
        raise RequestError(f"objective={asked.get('name')} beside source and target: pairs are seq2seq; leave it out")
    made = objective("seq2seq", special_tokens(tokenizer, architecture), max_source=length, max_target=length)
    made.fit(architecture)
    return made


def row_length(settings: TextSettings, architecture: Architecture) -> int:
    """Positions of a row: as asked, else 256 or as many as the model has."""
    if settings.length is not None:
        return settings.length
    limits = [stack.positions.limit for _, stack in architecture.stacks]
    return min([_LONGEST_ROW, *(limit for limit in limits if limit is not None)])


def natural_objective(
    architecture: Architecture, tokenizer: Tokenizer, asked: Mapping[str, Any] | None = None
) -> Objective | None:
    """What the model predicts: as asked, else causal, masked, span corruption or denoising by its stacks and tokens.

    None for a model without a language head.

    Raises:
        RequestError: an objective that does not fit the model or its tokenizer.
    """
    special = special_tokens(tokenizer, architecture)
    if asked:
        name = str(asked.get("name"))
        settings = {key: value for key, value in asked.items() if key != "name"}
        made = objective(name, special, **{**_PLAIN.get(name, {}), **settings})
    elif architecture.head.language is None:
        return None
    elif architecture.encoder is None:
        made = objective("causal", special)
    elif architecture.decoder is None:
        made = objective("masked", special)
    else:
        name = "span_corruption" if special.sentinels else "denoising"
        made = objective(name, special, **_PLAIN.get(name, {}))
    made.fit(architecture)
    if tuple(made.reads) != ("text",):
        raise RequestError(
            f"the objective {made.name} reads {', '.join(made.reads)}, and this is plain text; choose causal, masked, "
            "span_corruption or denoising with objective.permute=false, or name the columns of pairs: "
            "calibrate.source=en calibrate.target=ko"
        )
    return made


def _unlabelled(
    texts: Sequence[str], rows: int, length: int, architecture: Architecture, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """Whole texts, padded, for a model that has nothing to predict."""
    if architecture.decoder is not None and architecture.encoder is not None:
        raise RequestError("an encoder and a decoder without a language head: give calibrate as batches, from Python")
    for start in range(0, len(texts), rows):
        given = tokenizer(list(texts[start : start + rows]), truncation=True, max_length=length)
        inputs = dict(given)
        yield Batch(inputs, int(inputs["attention_mask"].sum()), 0, f"row {start}")
