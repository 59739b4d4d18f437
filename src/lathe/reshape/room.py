"""Whether a resize fits into memory, said before it starts: what does not is streamed (`lathe.reshape.stream`).

In memory a resize holds at once the source, what an operation makes of it and what the operation before it made (both
in float64), the child that is fitted beside its parent, and the result. A width's basis takes moments and gradients at
every norm, and a search for it rows as well. The estimate adds these up and is on the safe side: a resize that is
streamed without need takes longer and gives the same bytes. docs/reshaping.md holds it against measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.hub import fetch
from lathe.checkpoint.layout import find_weights
from lathe.checkpoint.load import read_architecture
from lathe.errors import RequestError
from lathe.generate.memory import free_bytes
from lathe.planner.activations import activations
from lathe.planner.memory import training_memory
from lathe.planner.quantities import bytes_text
from lathe.reshape.heal import HealSettings
from lathe.reshape.search import rows_for
from lathe.reshape.sensitivity import MOST_LOGITS, MOST_TOKENS
from lathe.reshape.text import TextSettings, row_length
from lathe.reshape.width import norms_of, streams_of

_FLOAT, _DOUBLE = 4, 8
_GRAMS = 6  # of the widest layer: what it reads, on both halves of the text, and what solving takes
_LOGITS = 3  # of a batch, as the loss makes them
_WASTE = 2**28  # holes that freed tensors leave between those that stay
_PASSING = 3  # matrices of a norm, while what one batch adds to them is added
_ROWS = 8  # of a norm, with what the search's loss makes of them and its gradient
_DIRECTIONS = 24  # of L-BFGS, which remembers ten steps and ten gradients, and a few more


def resize_bytes(
    source: Architecture,
    target: Architecture,
    itemsize: int,
    calibrate: TextSettings | None = None,
    how: Mapping[str, Any] | None = None,
) -> int:
    """What a resize takes in memory, the libraries aside.

    Args:
        itemsize: bytes of one number of the source.
        calibrate: the text that it is fitted on.
        how: the method and what else `planned` takes by name; the usual where left out.
    """
    old, new = (sum(parameter.size for parameter in stored(each)) for each in (source, target))
    needed = itemsize * old + _DOUBLE * (old + new) + (_FLOAT + itemsize) * new
    if calibrate is None:
        return needed
    widest = max(max(stack.feed_forward.d_ff, stack.attention.d_q, source.d_model) for _, stack in source.stacks)
    positions = calibrate.rows * row_length(calibrate, source)
    logits = _LOGITS * _FLOAT * positions * source.embedding.vocab_size
    needed += 2 * _FLOAT * calibrate.tokens * source.d_model + _GRAMS * _DOUBLE * widest**2 + logits
    if itemsize < _FLOAT:  # what is fitted, or has gradients, has more digits
        needed += _FLOAT * old
    if target.d_model < source.d_model:
        needed += _WASTE + _basis_bytes(source, target, calibrate, **(how or {}))
    return needed


def _basis_bytes(
    source: Architecture,
    target: Architecture,
    calibrate: TextSettings,
    *,
    method: str = "rotate",
    search: int | None = None,
    refit: bool | None = None,
    **_: Any,
) -> int:
    """What choosing the directions of a narrower stream takes."""
    norms, old, new = norms_of(source, "residual"), source.d_model, target.d_model
    moments = (len(norms) + _PASSING) * _DOUBLE * old**2
    if method != "rotate" or refit is False or search == 0 or streams_of(source, "residual"):
        return moments
    length = row_length(calibrate, source)
    kept = activations(source, max(min(MOST_TOKENS // length, calibrate.rows), 1), length)
    passing = kept.body + kept.inputs + 2 * max(each.layer for each in kept.stacks) + _LOGITS * _FLOAT * MOST_LOGITS
    rows = 2 * rows_for(new)  # never as many, and as few as half of it: the text may be shorter than was asked for
    working = _ROWS * _FLOAT * rows * old + _DIRECTIONS * _FLOAT * old * new
    return 2 * moments + (len(norms) + 1) * _FLOAT * rows * old + max(passing, working)


def reason_to_stream(
    name: str,
    changes: Mapping[str, Any],
    calibrate: TextSettings | None,
    how: Mapping[str, Any] | None = None,
    *,
    budget: bool = False,
) -> str:
    """Why a resize of a directory or hub id has to be streamed, in one line; empty where it fits into memory.

    Args:
        changes: fields to new values; what cannot be had is for others to refuse.
        how: the method and what else `planned` takes by name.
        budget: the sizes are still to be found, by cuts of every axis; a little off the width takes the most memory.

    Raises:
        RequestError: no such model.
    """
    free = free_bytes(torch.device("cpu"))
    if free is None:
        return ""
    source = read_architecture(name)
    numbers = sum(parameter.size for parameter in stored(source))
    nbytes = sum(path.stat().st_size for path in find_weights(fetch(name)).files)
    try:
        target = source.with_(changes)
        if budget and target.d_model == source.d_model > 1:
            target = target.with_(d_model=source.d_model - 1)
    except RequestError:
        target = source
    needed = resize_bytes(source, target, max(round(nbytes / numbers), 1), calibrate, how)
    if needed <= free:
        return ""
    return (
        f"streaming: in memory this resize would take about {bytes_text(needed)} and {bytes_text(free)} are free; one "
        "layer at a time gives the same bytes and takes longer (stream=false to try it in memory)"
    )


def check_healing(target: Architecture, settings: HealSettings) -> None:
    """Refuse to train a result that does not fit into memory, where the parent already has to be streamed.

    Raises:
        RequestError: with what it takes and what to do.
    """
    free = free_bytes(torch.device("cpu"))
    needed = training_memory(target, settings.rows, row_length(settings.text, target)).total
    if free is not None and needed > free:
        raise RequestError(
            f"healing trains the whole result, which takes about {bytes_text(needed)}, and {bytes_text(free)} are "
            "free: give a smaller heal.rows or heal.length, or leave out heal here and heal on a larger machine"
        )
