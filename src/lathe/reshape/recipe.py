"""`lathe.json`: how a model was made from another, so that it can be made again to the same bytes.

    {"lathe": "0.1.0",
     "recipe": {
       "source": {"model": "my-t5", "sha256": …},
       "how": {"method": "rotate"}, "seed": 0, "objective": {},
       "calibrate": {"file": "corpus.txt", "tokens": 65536, …, "sha256": …, "documents": 812},
       "stages": [{"resize": {"d_model": 384}, "operations": [{"name": "rotate d_model 512 → 384", "exact": false}]},
                  {"heal": {"steps": 200, …}, "text": {…, "sha256": …}}],
       "made_with": {"torch": "2.13.0", "threads": 2}},
     "weights": {"model.safetensors": …}}

A model in Lathe's own form has its `architecture` in the same file. The sums of products depend on the number of
threads and on the release of torch, so both are noted, and a warning says where they differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe._version import __version__
from lathe.checkpoint.digest import digest_file
from lathe.checkpoint.hub import SETTINGS_FILES
from lathe.checkpoint.layout import find_weights
from lathe.checkpoint.load import OWN
from lathe.errors import RequestError
from lathe.spec import Spec, size

log = logging.getLogger("lathe")


@dataclass(frozen=True, kw_only=True)
class Recipe(Spec):
    """What was done to which model, with which text; see the module."""

    source: dict  # type: ignore[type-arg]
    stages: list  # type: ignore[type-arg]
    how: dict = field(default_factory=dict)  # type: ignore[type-arg]
    seed: int = size(2**32 - 1, least=0, default=0)
    objective: dict = field(default_factory=dict)  # type: ignore[type-arg]
    calibrate: dict | None = None  # type: ignore[type-arg]
    vocabulary: dict | None = None  # type: ignore[type-arg]  # what it was asked to hold, beside its size
    remainder: int | None = None  # the rank of what layers that came to share weights differ by
    budget: dict | None = None  # type: ignore[type-arg]  # how the sizes were found; a replay takes them as they are
    made_with: dict = field(default_factory=dict)  # type: ignore[type-arg]
    obstacle: str = ""  # why it cannot be done again from files, where it cannot


@dataclass(frozen=True)
class Written:
    """A recipe as it was read from a file."""

    recipe: Recipe
    lathe: str  # the release that wrote it
    weights: Mapping[str, str]  # the SHA-256 of each file of weights that came out


def machine() -> dict[str, Any]:
    """What the last bits of a sum depend on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def source_digest(directory: Path) -> str:
    """The SHA-256 of a checkpoint: its weights, its config and its tokenizer, by name and content."""
    names = [name for name in SETTINGS_FILES if "*" not in name and (directory / name).is_file()]
    files = {name: directory / name for name in names if name != OWN or "config.json" not in names}
    files |= {path.name: path for path in find_weights(directory).files}
    hashed = hashlib.sha256()
    for name in sorted(files):
        hashed.update(f"{name}:{digest_file(files[name])}\n".encode())
    return hashed.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors by name and content."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().flatten()
        hashed.update(f"{name}:".encode())
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digest_of_batches(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """The SHA-256 of text that was given as token ids."""
    hashed = hashlib.sha256()
    for batch in batches:
        hashed.update(digest_of(batch).encode())
    return hashed.hexdigest()


def weight_digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights."""
    return {path.name: digest_file(path) for path in find_weights(directory).files}


def written(recipe: Recipe, weights: Mapping[str, str], beside: Mapping[str, Any]) -> str:
    """The text of `lathe.json`.

    Args:
        beside: what else the file holds: the architecture, in Lathe's own form.
    """
    values = {**beside, "lathe": __version__, "recipe": recipe.to_dict(), "weights": dict(weights)}
    return json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def read_recipe(path: Path) -> Written:
    """A recipe from `lathe.json`, or from the directory that holds one.

    Raises:
        RequestError: no such file, or no recipe in it.
    """
    path = path.expanduser()
    file = path / OWN if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the recipe {file}: {error.strerror}; give a lathe.json") from None
    except ValueError as error:
        raise RequestError(f"{file} is not JSON ({error}); give the lathe.json that lathe resize wrote") from None
    if not isinstance(values, dict) or not isinstance(values.get("recipe"), dict):
        raise RequestError(f"{file} holds no recipe; give the lathe.json that lathe resize wrote")
    recipe = Recipe.from_dict(values["recipe"], "recipe")
    for number, stage in enumerate(recipe.stages, start=1):
        if not isinstance(stage, dict) or len({"resize", "heal"} & set(stage)) != 1:
            raise RequestError(f"{file}: stage {number} of the recipe neither resizes nor heals; is the file complete?")
    return Written(recipe, str(values.get("lathe", "")), dict(values.get("weights") or {}))


def warn_of_differences(written: Written) -> None:
    """Say what may make the last bits differ here from where the recipe was written."""
    then = {"lathe": written.lathe, **written.recipe.made_with}
    now = {"lathe": __version__, **machine()}
    changed = [name for name in now if then.get(name) not in (None, now[name])]
    different = [f"{name} {then[name]} then, {now[name]} now" for name in changed]
    if different:
        log.warning("the bytes may differ from the recipe's: %s", "; ".join(different))


def require_same(what: str, then: str, now: str) -> None:
    """Refuse to replay a recipe on something else."""
    if then != now:
        raise RequestError(
            f"{what} is not what the recipe was made with (SHA-256 {now[:12]}…, expected {then[:12]}…); give the same"
        )
