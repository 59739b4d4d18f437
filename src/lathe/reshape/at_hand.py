"""A resize of a model that is in memory, written down as the command line writes one down.

The work is the command's (`lathe.reshape.carry_out`); only where things come from differs. A source counts as the
directory that it was loaded from if its weights are still those of the files. Text given as token ids, a vocabulary
given as a list, or weights that were trained on in between leave a recipe that says what was done and by how much, and
that it cannot be done again from files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lathe.adapt import folded_tensors
from lathe.checkpoint.atomic import atomic_directory
from lathe.checkpoint.load import open_checkpoint
from lathe.checkpoint.save import Saved
from lathe.errors import LatheError
from lathe.model.transformer import Transformer
from lathe.reshape.carry_out import healed_step
from lathe.reshape.history import History, Made, outcome_of, write
from lathe.reshape.outcome import Outcome
from lathe.reshape.recipe import Recipe, digest_of, source_digest
from lathe.reshape.source import open_source
from lathe.reshape.text import VocabularySettings
from lathe.reshape.vocabulary import Vocabulary
from lathe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lathe.reshape.heal import Healing, HealSettings
    from lathe.reshape.text import Documents


def stored_digest(model: Transformer, directory: Path | None, tokenizer: Tokenizer | None) -> str | None:
    """The digest of the files that a model was loaded from; None where they are not what it is now."""
    if directory is None or not _is_stored(tokenizer, directory):
        return None
    try:
        checkpoint = open_checkpoint(directory)
    except LatheError:  # it went away or was written over meanwhile; or holds codes, of which no recipe can begin
        return None
    if checkpoint.architecture != model.architecture:
        return None
    mine, parameters = folded_tensors(model), checkpoint.parameters
    for name in parameters.names():
        theirs, ours = parameters.tensor(name), mine[name].cpu()
        if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
            return None
    return source_digest(directory)


def _is_stored(tokenizer: Tokenizer | None, directory: Path) -> bool:
    """Whether a directory holds this very tokenizer, or none where there is none."""
    if tokenizer is None or not Tokenizer.is_in(directory):
        return tokenizer is None and not Tokenizer.is_in(directory)
    try:
        return Tokenizer.load(directory).files == tokenizer.files
    except LatheError:
        return False


def in_words(asked: Vocabulary | None) -> VocabularySettings | None:
    """A vocabulary as a request on the command line would ask for it; None where none could."""
    if asked is None or asked.ids is not None:
        return None
    if asked.corpus is not None and not isinstance(asked.corpus, os.PathLike):
        return None
    file = None if asked.corpus is None else os.fspath(asked.corpus)
    return VocabularySettings(file=file, words=tuple(asked.words), multiple_of=asked.multiple_of)


def digests(model: Transformer, teacher: Transformer) -> dict[str, str]:
    """By what a run that is kept knows the cut that it began with, and its teacher."""
    return {"cut": digest_of(folded_tensors(model)), "teacher": digest_of(folded_tensors(teacher))}


def healed(
    history: History,
    model: Transformer,
    tokenizer: Tokenizer | None,
    settings: HealSettings,
    documents: Documents,
    done: Healing,
    before: Tensor,
    *,
    is_from_source: bool,
) -> History:
    """The history with a healing, which `model` has been through.

    Args:
        history: as it was before.
        before: the logits of `Reading.ids` then.
        is_from_source: whether the teacher was the model that the history began with.
    """
    recipe = history.recipe
    stage = {"heal": settings.to_dict(), "sha256": documents.digest, "documents": len(documents.texts)}
    obstacle = recipe.obstacle or ("" if is_from_source else "it was healed from another model than its source")
    title = f"healing {1 + len(history.curves)}"
    made = dataclasses.replace(
        history,
        recipe=dataclasses.replace(recipe, stages=[*recipe.stages, stage], obstacle=obstacle),
        steps=list(history.steps),
        curves={**history.curves, title: done.curve},
        weights=digest_of(folded_tensors(model)),
    )
    made.note(model, tokenizer, [healed_step(done)], before, heals=True)
    return made


def save_with_pages(
    made: Made,
    history: History,
    directory: Path,
    *,
    pages: Callable[[Outcome, Recipe], Mapping[str, str]] | None,
    max_shard_bytes: int,
    replace: bool,
) -> Saved:
    """Write a model that was made from another: the checkpoint, its recipe, and its pages.

    Args:
        pages: makes the text files that describe the result, once it has been opened again; None: none of them.

    Raises:
        RequestError: `directory` exists.
        LatheError: the disk is full; nothing is left behind.
    """
    if history.was_changed(made.model):
        history = history.with_unknown(made.model, made.tokenizer)
    nbytes = sum(tensor.nbytes for tensor in made.tensors.values())
    with atomic_directory(directory, replace=replace, nbytes=nbytes) as folder:
        saved, _ = write(made, history, folder, max_shard_bytes=max_shard_bytes)
        if pages is not None:
            reloaded = open_source(str(folder)).model
            outcome = outcome_of(made, history, folder, saved, directory.name, reloaded)
            for name, text in pages(outcome, history.recipe).items():
                (folder / name).write_text(text, encoding="utf-8")
    return dataclasses.replace(saved, directory=directory)
