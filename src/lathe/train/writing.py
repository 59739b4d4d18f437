"""What a sequence-to-sequence model writes for the sources of a corpus, next to what it should have written.

The encoder reads the very ids that the objective gives it in training, its shortening included. One token at a time, a
text that ends makes room for the next source (`lathe.generate.continuous`). Beams are searched in batches of sources of
similar length: a batch runs as long as its longest text, so a long one among short ones makes all of them wait. The
shortest sources come first, and the answers in the corpus's order.

Shape suffixes: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lathe.data.corpus import Corpus
from lathe.errors import RequestError
from lathe.generate.continuous import rows_as_finished
from lathe.generate.decode import decode
from lathe.generate.settings import Settings
from lathe.model.transformer import Transformer
from lathe.objectives.seq2seq import Seq2Seq
from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Written:
    """What the model wrote for one source; `ended`: by an end mark or a stop string, and not by its limit."""

    text: str
    ended: bool


def write_all(
    model: Transformer,
    tokenizer: Tokenizer,
    objective: Seq2Seq,
    corpus: Corpus,
    settings: Mapping[str, Any],
    *,
    stored: Mapping[str, Any] | None = None,
    batch: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> list[Written]:
    """The model's text for each source of the corpus, in its order.

    Args:
        settings: as for `lathe.generate.generate`. A seed gives each text a stream of its own, whatever the batch.
        stored: the generation settings that came with the model.
        batch: how many texts are written at once.
        on_done: called with how many texts have come to their end since the last call.

    Raises:
        RequestError: what `generate` refuses.
    """
    resolved = Settings.resolve(model.architecture, settings, stored)
    sources = [_source(objective, corpus, number) for number in range(len(corpus))]
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
    seed = settings.get("seed")
    if seed is not None and not isinstance(seed, int):
        raise RequestError(f"seed={seed}: expected one number; each text has a stream of its own by it")

    def given(chosen: Sequence[int]) -> dict[str, Any]:
        seeds = {} if seed is None else {"seed": tuple(seed + number for number in chosen)}
        return {**settings, **seeds, "stored": stored, "tokenizer": tokenizer}

    found: dict[int, Written] = {}
    if resolved.num_beams == 1 and resolved.num_return_sequences == 1:
        ids = [sources[number] for number in order]
        for row in rows_as_finished(model, ids, slots=batch, **given(order)) if ids else ():
            found[order[row.number]] = _read(tokenizer, row.ids, row.ended, resolved.eos_token_id)
            if on_done is not None:
                on_done(1)
        return [found[number] for number in range(len(sources))]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids_BT, mask_BT = _padded([sources[number] for number in chosen], resolved.filler)
        rows = decode(model, ids_BT, mask_BT, **given(chosen))
        new_RT = rows.sequences_RT[:, rows.n_prompt :]
        for number, row, ended in zip(chosen, new_RT.tolist(), rows.ended_R.tolist()):
            found[number] = _read(tokenizer, row, ended, resolved.eos_token_id)
        if on_done is not None:
            on_done(len(chosen))
    return [found[number] for number in range(len(sources))]


def _source(objective: Seq2Seq, corpus: Corpus, number: int) -> list[int]:
    record = {name: corpus.fields[name].row(number) for name in objective.reads}
    ids: list[int] = objective.sample(record, np.random.default_rng(0)).input_ids.tolist()
    return ids


def _padded(rows: Sequence[list[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids_BT, mask_BT


def _read(tokenizer: Tokenizer, ids: list[int], ended: bool, ends: tuple[int, ...]) -> Written:
    """The text up to the first end mark, where there is one: a text that a stop string ended has none."""
    at = next((place for place, each in enumerate(ids) if each in ends), None)
    # The model's table may have more rows than the vocabulary has tokens.
    return Written(tokenizer.decode(ids[:at], True, errors="replace"), ended)
