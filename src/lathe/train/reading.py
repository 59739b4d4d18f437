"""The data that a request names, as the token ids that its objective reads.

An objective says which fields it reads; `fields` says which columns of the file these are, where the names differ.
Several tasks of a sequence-to-sequence model are a table: each has its files, its columns and the words that are
set before its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice

from lathe.data.cache import cached
from lathe.data.corpus import Corpus
from lathe.data.sources import read
from lathe.data.tasks import Task, pairs
from lathe.data.tokenise import BREAKS, tokenise_records
from lathe.errors import RequestError
from lathe.objectives.base import Objective
from lathe.text.tokenizer import Tokenizer
from lathe.train.request import DataSettings, TaskSettings

Record = Mapping[str, str]


def training_corpus(data: DataSettings, tokenizer: Tokenizer, made: Objective, *, limit: int | None = None) -> Corpus:
    """The documents to train on; the first `limit` of them.

    Raises:
        RequestError: no such file or column, nothing in it, or data that the objective cannot read.
    """
    return _corpus(data, tokenizer, made, validation=False, limit=limit)


def validation_corpus(data: DataSettings, tokenizer: Tokenizer, made: Objective) -> Corpus | None:
    """The documents to evaluate on; None where the request names none."""
    if not data.files(validation=True) and not any(task.validation for task in data.tasks_by_name().values()):
        return None
    return _corpus(data, tokenizer, made, validation=True)


def records(data: DataSettings, made: Objective, *, validation: bool, limit: int | None = None) -> Iterator[Record]:
    """The records as the objective wants them, from the disk; the first `limit` of them."""
    return islice(_records(data, made, validation), limit)


def _records(data: DataSettings, made: Objective, validation: bool) -> Iterator[Record]:
    tasks = data.tasks_by_name()
    if tasks:
        if "source" not in made.reads:
            raise RequestError(f"data.tasks are for pairs; the objective {made.name} reads {', '.join(made.reads)}")
        return chain.from_iterable(_pairs(task, data.format, validation) for task in tasks.values())
    columns = data.fields
    if validation and data.validation_fields is not None:
        columns = data.validation_fields
    wanted = {name: columns.get(name, name) for name in made.reads if name != BREAKS}
    unread = [name for name in columns if name not in wanted]
    if unread:
        raise RequestError(
            f"data.fields.{unread[0]}: the objective {made.name} does not read it; it reads {', '.join(wanted)}"
        )
    files = data.files(validation=validation)
    return chain.from_iterable(read(file, fields=wanted, format=data.format) for file in files)


def _pairs(task: TaskSettings, format: str | None, validation: bool) -> Iterable[Record]:
    file = task.validation if validation else task.train
    if file is None:
        return ()
    fields = {task.source: task.source, task.target: task.target}
    return pairs(read(file, fields=fields, format=format), Task(task.prefix, task.source, task.target))


def _corpus(
    data: DataSettings, tokenizer: Tokenizer, made: Objective, *, validation: bool, limit: int | None = None
) -> Corpus:
    breaks = data.breaks if BREAKS in made.reads else None
    labels = [name.strip() for name in data.labels.split(",")] if data.labels is not None else None
    source = partial(records, data, made, validation=validation, limit=limit)
    if data.cache is None:
        return tokenise_records(tokenizer, source(), breaks=breaks, labels=labels)
    return cached(data.cache, tokenizer, source, breaks=breaks, labels=labels)
