"""Pairs for sequence-to-sequence models: which column is asked for which, and the words that say so.

One model learns several tasks when each source begins with words that name the task (T5 §2.4). A `Task` makes
pairs of records, and one record can serve several:

    to_korean = Task("translate English to Korean: ", source="en", target="ko")
    to_english = Task("translate Korean to English: ", source="ko", target="en")
    answer = Task("answer: ", source="question", target="answer")
    both = pairs(read(…, fields={"en": "en", "ko": "ko"}), to_korean, to_english)

The pairs of all tasks together are shuffled like any other data, so each task is seen in proportion to its
examples. The same words, before the same kind of text, then call up the task in the trained model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lathe.errors import RequestError


@dataclass(frozen=True)
class Task:
    """One task: `prefix` is set before the field `source`, and the field `target` is to be written."""

    prefix: str = ""
    source: str = "source"
    target: str = "target"


def pairs(records: Iterable[Mapping[str, str]], *tasks: Task) -> Iterator[dict[str, str]]:
    """For each record one pair a task, with the fields `source` and `target`.

    Raises:
        RequestError: no task was given, or a record lacks a field of one.
    """
    if not tasks:
        raise RequestError("pairs need a task that says which field is the source and which the target")
    for number, record in enumerate(records, start=1):
        for task in tasks:
            for name in (task.source, task.target):
                if name not in record:
                    raise RequestError(f"record {number}: there is no field {name!r}; it has {', '.join(record)}")
            yield {"source": task.prefix + record[task.source], "target": record[task.target]}
