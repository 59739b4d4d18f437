"""What a training run is asked, as one record; a YAML file and `key=value` words both become it.

    model: t5-small                # a preset, an architecture's JSON file: new weights; a directory, a hub id: trained
    architecture: {d_model: 256}   # sizes of new weights
    tokenizer: my-tokenizer        # a directory; left out where the model brings one
    objective: {name: span_corruption}
    data: {train: corpus.txt, validation: held-out.txt, length: 128, rows: 16}
    steps: 2000                    # and every other field of TrainSettings
    optimizer: {lr: 3e-3}
    adapter: {rank: 8}             # LoRA, on a trained model
    save: {every: 500, keep: 2}
    out: runs/small

An unknown key is refused with the keys there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lathe.adapt.settings import LoraSettings
from lathe.architecture import ALIASES, Architecture
from lathe.errors import RequestError
from lathe.spec import Spec, choice, size, unknown
from lathe.train.settings import SaveSettings, TrainSettings, chosen_precision
from lathe.train.text_scores import BLEU_TOKENIZERS


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Spec):
    """One task of several: its files, its columns, and the words set before its source."""

    train: str
    validation: str | None = None
    prefix: str = ""
    source: str = "source"
    target: str = "target"


@dataclass(frozen=True, kw_only=True)
class DataSettings(Spec):
    """Which data, and how it is laid into batches."""

    train: str | list | None = None  # type: ignore[type-arg]  # a file, or a name for the library datasets; or several
    validation: str | list | None = None  # type: ignore[type-arg]
    fields: dict = field(default_factory=dict)  # type: ignore[type-arg]  # what the objective reads -> the column
    validation_fields: dict | None = None  # type: ignore[type-arg]  # the same for validation, where it has others
    tasks: dict = field(default_factory=dict)  # type: ignore[type-arg]  # a name -> TaskSettings; in place of train
    format: str | None = None  # of the files; by their names
    breaks: str = choice("line", "paragraph", "sentence", default="sentence")  # for objectives that order sentences
    labels: str | None = None  # names of the classes in their order, with commas; none: they are numbers
    cache: str | None = "~/.cache/lathe"  # where token ids are kept; none: in memory
    length: int = size(2**24, least=8, default=128)  # positions of a row
    target_length: int | None = size(2**24, default=None)  # of the decoder's row; what the data needs
    rows: int = size(2**20, default=16)  # in a batch
    validation_batches: int | None = size(2**30, default=32)  # none: all of it
    seed: int = size(2**32 - 1, least=0, default=0)  # of the order and of what the objective draws

    def check(self) -> None:
        if bool(self.tasks) == bool(self.train):
            raise RequestError("train: give a file to train on, or tasks, and not both")
        if self.tasks and (self.validation or self.fields or self.validation_fields):
            raise RequestError("tasks: each has its own validation and columns; leave validation and fields out")
        for name in ("train", "validation"):
            files = getattr(self, name)
            if isinstance(files, list) and not (files and all(isinstance(file, str) for file in files)):
                raise RequestError(f"{name}={files}: expected a file, or a list of files")
        self.tasks_by_name()

    def files(self, *, validation: bool) -> list[str]:
        """The files to train on, or to evaluate on, in their order."""
        files = self.validation if validation else self.train
        return [] if files is None else files if isinstance(files, list) else [files]

    def tasks_by_name(self) -> dict[str, TaskSettings]:
        """The tasks as records."""
        return {name: TaskSettings.from_dict(values, f"tasks.{name}") for name, values in self.tasks.items()}


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainSettings):
    """Everything that a run is asked. `objective` holds its name and its own settings."""

    model: str
    data: DataSettings
    objective: dict  # type: ignore[type-arg]  # checked by the objective itself
    architecture: dict = field(default_factory=dict)  # type: ignore[type-arg]  # checked by the architecture
    tokenizer: str | None = None
    adapter: LoraSettings | None = None  # train a LoRA adapter and leave the model as it is; none: train all of it
    save: SaveSettings = field(default_factory=SaveSettings)
    out: str | None = None  # where the run is kept; none: runs/MODEL-OBJECTIVE
    device: str = "auto"
    precision: str = choice("auto", "fp32", "bf16", default="auto")  # auto: bf16 on CUDA, fp32 elsewhere

    def check(self) -> None:
        super().check()
        if not isinstance(self.objective.get("name"), str):
            raise RequestError("objective: expected its name, as objective=causal or objective: {name: causal}")

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.out or f"runs/{Path(self.model).name}-{self.objective['name']}").expanduser()

    def training(self, device_type: str) -> TrainSettings:
        """The part of it that the loop needs, on a device of that type."""
        values = {name: getattr(self, name) for name in TrainSettings.field_names()}
        values["precision"] = chosen_precision(self.precision, device_type)
        return TrainSettings(**values)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Spec):
    """What `lathe evaluate` is asked; `data.train` is the data that is evaluated on."""

    model: str
    data: DataSettings
    objective: dict = field(default_factory=dict)  # type: ignore[type-arg]  # left out: what the model's head says
    tokenizer: str | None = None
    adapter: str | None = None  # the directory of an adapter to put on the model
    device: str = "auto"
    precision: str = choice("fp32", "bf16", default="fp32")  # of the loss; texts are written in the weights' own
    limit: int | None = size(2**40, default=None)  # the first records of the data, or of each task
    write: bool = True  # sequence to sequence: let the model write, and compare with the target
    generate: dict = field(default_factory=dict)  # type: ignore[type-arg]  # checked by lathe.generate
    batch: int = size(2**20, default=32)  # texts that are written at once
    bleu_tokenize: str = choice(*BLEU_TOKENIZERS, default="13a")
    outputs: str | None = None  # a file of JSON lines to keep what the model wrote


def read_request(tree: Mapping[str, Any], words: Mapping[str, Any]) -> RunSettings:
    """The record that a file's tree and the command line's `key=value` words ask for; the words win.

    Args:
        tree: nested values, as a YAML file holds them.
        words: dotted keys to values. `objective=NAME` and `data=FILE` are short for `objective.name` and
            `data.train`; a key that belongs to the architecture may stand without `architecture.` before it.

    Raises:
        RequestError: an unknown key, a value that cannot be.
    """
    if not isinstance(tree, Mapping):
        raise RequestError("the run file holds no keys; expected model, data, objective and a budget")
    leaves = list(_leaves(tree, ""))
    for given in (leaves, words.items()):
        _refuse_twice((key for key, _ in given), RunSettings)
    return RunSettings.from_dict(_merged([*leaves, *words.items()], RunSettings))


def read_evaluation(words: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> EvaluationSettings:
    """The record of an evaluation that `key=value` words ask for; `data=FILE` is short for `data.train`.

    Args:
        run: what a training run was asked: its objective, and its data with what it validates on as what is
            evaluated on. The words win.
    """
    given = dict(words)
    _refuse_twice(given, EvaluationSettings)
    if run is not None:
        given = {**dict(_leaves(_held_out(run), "")), **given}
        if not any(_full(key, EvaluationSettings).startswith(("data.train", "data.tasks")) for key in given):
            raise RequestError("the run has no validation data to evaluate on; give data=FILE")
    return EvaluationSettings.from_dict(_merged(given.items(), EvaluationSettings))


def _held_out(run: Mapping[str, Any]) -> dict[str, Any]:
    """The objective and the validation data of a run's tree."""
    data = run.get("data") if isinstance(run, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(data.get("tasks", {}), Mapping):
        raise RequestError("the run names no data: expected what lathe train was given, or the run.json that it left")
    gone = ("train", "validation", "validation_fields", "tasks")
    held = {key: value for key, value in data.items() if key not in gone}
    if data.get("validation_fields"):
        held["fields"] = data["validation_fields"]
    tasks = {
        name: {**{key: value for key, value in task.items() if key != "validation"}, "train": task["validation"]}
        for name, task in data.get("tasks", {}).items()
        if isinstance(task, Mapping) and task.get("validation")
    }
    if tasks:
        held["tasks"] = tasks
    elif data.get("validation"):
        held["train"] = data["validation"]
    return {key: value for key, value in (("data", held), ("objective", run.get("objective"))) if value}


_SHORT = {"objective": "objective.name", "data": "data.train"}
# What only files hold as a flat table, because its keys have dots of their own.
_TABLE = "architecture"


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, place)
        else:
            yield place, value


def _merged(pairs: Iterable[tuple[str, Any]], kind: type[Spec]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in pairs:
        _assign(merged, _full(str(key), kind), value)
    return merged


def _refuse_twice(keys: Iterable[str], kind: type[Spec]) -> None:
    """Refuse a key that one source gives in two spellings, of which one would be lost."""
    seen: dict[str, str] = {}
    for key in keys:
        before = seen.setdefault(_full(key, kind), key)
        if before != key:
            raise RequestError(f"{before} and {key} are the same key, which is set twice; give one of them")


def _full(key: str, kind: type[Spec]) -> str:
    """The key where it stands in the record."""
    if key in _SHORT:
        return _SHORT[key]
    first, has_sizes = key.split(".")[0], _TABLE in kind.field_names()
    if first in kind.field_names():
        return key
    if has_sizes and first in {*Architecture.field_names(), *ALIASES}:
        return f"{_TABLE}.{key}"
    more = "; sizes of the architecture are keys, too" if has_sizes else ""
    raise RequestError(unknown("key", key, kind.field_names()) + more)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    if first == _TABLE and rest:
        tree.setdefault(_TABLE, {})[rest] = value
        return
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RequestError(f"{key}={value}: {parent} is one value and has no {leaf}; set {parent} itself")
    tree[leaf] = value
