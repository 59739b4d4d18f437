"""Checkpoints of a run: written whole or not at all, checked before they are trusted, few enough to keep.

    RUN/checkpoints/step-400/    config.json, model.safetensors, the tokenizer: a model that stock tools open
                                 optimizer/model.safetensors: the optimiser's moments, by parameter name
                                 trainer.json: counts, the position in the data, what the run was asked
                                 manifest.json: the SHA-256 of every other file
    RUN/checkpoints/last, best   links to two of them

A checkpoint is written to a temporary directory, flushed, and renamed into place in one step, so a process that
is killed leaves the one before. A disk can still lose or change bytes later; the manifest finds that out. On a
resume the newest checkpoint is checked first, and one that is damaged is named in a warning and passed over.

Old checkpoints are renamed before they are removed: what looks like a checkpoint is one.

A run on several ranks leaves the same files: its parts are gathered one tensor after another, and the main rank
writes them whole. `torch.distributed.checkpoint` would let every rank write its own part, which is faster for models
of many gigabytes; but the parts are no model that stock tools open, and one rank of several can die between two
files. Written whole, a checkpoint is renamed into place once, checked by one manifest, and goes on on any number of
ranks. The price is the main rank's memory: 12 bytes a parameter on the CPU while it saves.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lathe.checkpoint.atomic import atomic_directory, recover
from lathe.checkpoint.digest import digest
from lathe.checkpoint.load import open_checkpoint
from lathe.checkpoint.tensors import open_tensors, write_tensors
from lathe.errors import LatheError

log = logging.getLogger("lathe")

_STEP = re.compile(r"step-([0-9]+)")
_GONE = ".lathe-gone-"
_MANIFEST, _STATE, _OPTIMIZER = "manifest.json", "trainer.json", "optimizer"
TRAINED = "trained"  # what a run with an adapter trains; its base is not in the checkpoint


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is on the disk and whole; `state` is its trainer.json."""

    path: Path
    step: int
    state: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by the blueprint's names, as views of the file; of an adapter, those that it trains."""
        if (self.path / TRAINED).is_dir():
            with open_tensors(self.path / TRAINED) as source:
                return dict(source.items())
        parameters = open_checkpoint(self.path).parameters
        return {name: parameters.tensor(name) for name in parameters.names()}

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors as `Run.tensors` named them; none of a run that has made no step."""
        if not (self.path / _OPTIMIZER).is_dir():
            return {}
        with open_tensors(self.path / _OPTIMIZER) as source:
            return dict(source.items())


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many of the newest stay; the best one stays besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, whole or not, in order."""
        if not self.folder.is_dir():
            return []
        found = [_STEP.fullmatch(entry.name) for entry in self.folder.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step}"

    def save(
        self,
        step: int,
        write_model: Callable[[Path], object],
        moments: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: int | None,
    ) -> Path:
        """Write the checkpoint of `step`, point `last` at it and `best` at that step, and drop what is too old.

        Args:
            write_model: writes the model's directory at the path that it is given.

        Raises:
            LatheError: the disk is full; the checkpoints before are as they were.
        """
        path = self.path(step)
        with atomic_directory(path, replace=True, nbytes=sum(tensor.nbytes for tensor in moments.values())) as made:
            # The model's own writer makes a directory of its own; its files belong beside ours.
            write_model(made / "model")
            for entry in (made / "model").iterdir():
                entry.rename(made / entry.name)
            (made / "model").rmdir()
            if moments:
                (made / _OPTIMIZER).mkdir()
                write_tensors(made / _OPTIMIZER, moments)
            (made / _STATE).write_text(_text(state), encoding="utf-8")
            (made / _MANIFEST).write_text(_text(digest(made)), encoding="utf-8")
        self.link(step, best)
        self._drop_old(step, best)
        return path

    def newest(self) -> Stored | None:
        """The newest checkpoint that is whole; each damaged one before it is named in a warning.

        Raises:
            LatheError: there are checkpoints, and every one is damaged.
        """
        for step in self._moved_aside():
            recover(self.path(step))
        steps, trouble = self.steps(), ""
        for step in reversed(steps):
            found = damage(self.path(step))
            if found is None:
                state = json.loads((self.path(step) / _STATE).read_text(encoding="utf-8"))
                return Stored(self.path(step), step, state)
            trouble = found
            log.warning("the checkpoint of step %d is damaged: %s; trying the one before it", step, found)
        if steps:
            raise LatheError(
                f"no checkpoint in {self.folder} is whole: {trouble}; restore that file, or start a new run elsewhere"
            )
        return None

    def link(self, last: int, best: int | None) -> None:
        """Point `last` and `best` at these steps."""
        for name, step in (("last", last), ("best", best)):
            link = self.folder / name
            if step is None or not self.path(step).is_dir():
                link.unlink(missing_ok=True)
                continue
            fresh = self.folder / f".{name}.new"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(self.path(step).name)
            fresh.replace(link)

    def _drop_old(self, newest: int, best: int | None) -> None:
        # What is newer than the one just written is damaged: a resume passed it over.
        older = [step for step in self.steps() if step <= newest]
        for step in set(self.steps()) - set(older[-self.keep :]) - {best}:
            gone = self.folder / f"{_GONE}step-{step}"
            shutil.rmtree(gone, ignore_errors=True)
            self.path(step).rename(gone)
        for leftover in self.folder.glob(f"{_GONE}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _moved_aside(self) -> Iterator[int]:
        """Steps whose checkpoint a killed save had moved aside, where directories cannot be exchanged."""
        if self.folder.is_dir():
            for entry in sorted(self.folder.iterdir()):
                match = re.fullmatch(r"\.lathe-old-[0-9a-f]{12}\.step-([0-9]+)", entry.name)
                if match:
                    yield int(match[1])


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, naming the first; None where all are as they were written."""
    manifest: Any = None
    with suppress(OSError, ValueError):
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or _STATE not in manifest:
        return f"{path / _MANIFEST} is missing or cannot be read"
    found = digest(path)
    for name, wanted in manifest.items():
        if name not in found:
            return f"{path / name} is missing"
        if found[name] != wanted:
            return f"{path / name} is not what was written (its checksum differs)"
    return None


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
