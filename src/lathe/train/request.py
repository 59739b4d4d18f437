"""What a training run is asked, as one record; a YAML file and `key=value` words both become it.

    model: t5-small                # a preset, an architecture's JSON file: new weights; a directory, a hub id: trained
    architecture: {d_model: 256}   # sizes of new weights
    tokenizer: my-tokenizer        # a directory; left out where the model brings one
    objective: {name: span_corruption}
    data: {train: corpus.txt, validation: held-out.txt, length: 128, rows: 16}
    steps: 2000                    # and every other field of TrainSettings
    optimizer: {lr: 3e-3}
    save: {every: 500, keep: 2}
    out: runs/small

An unknown key is refused with the keys there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lathe.architecture import ALIASES, Architecture
from lathe.errors import RequestError
from lathe.spec import Spec, choice, size, unknown
from lathe.train.settings import SaveSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class DataSettings(Spec):
    """Which text, and how it is laid into batches."""

    train: str
    validation: str | None = None
    length: int = size(2**24, least=8, default=128)  # positions of a row
    target_length: int | None = size(2**24, default=None)  # of the decoder's row; what the data needs
    rows: int = size(2**20, default=16)  # in a batch
    validation_batches: int | None = size(2**30, default=32)  # none: all of it
    seed: int = size(2**32 - 1, least=0, default=0)  # of the order and of what the objective draws


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainSettings):
    """Everything that a run is asked. `objective` holds its name and its own settings."""

    model: str
    data: DataSettings
    objective: dict  # type: ignore[type-arg]  # checked by the objective itself
    architecture: dict = field(default_factory=dict)  # type: ignore[type-arg]  # checked by the architecture
    tokenizer: str | None = None
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
        if self.precision == "auto":
            values["precision"] = "bf16" if device_type == "cuda" else "fp32"
        return TrainSettings(**values)


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
    merged: dict[str, Any] = {}
    for key, value in [*_leaves(tree, ""), *words.items()]:
        _assign(merged, _full(str(key)), value)
    return RunSettings.from_dict(merged)


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


def _full(key: str) -> str:
    """The key where it stands in the record."""
    if key in _SHORT:
        return _SHORT[key]
    first = key.split(".")[0]
    if first in RunSettings.field_names():
        return key
    if first in {*Architecture.field_names(), *ALIASES}:
        return f"{_TABLE}.{key}"
    raise RequestError(unknown("key", key, RunSettings.field_names()) + "; sizes of the architecture are keys, too")


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
