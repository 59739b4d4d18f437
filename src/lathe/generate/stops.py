"""Texts that end a row: the row is over with the token that completes one of them.

A text may come in any pieces, begin in the middle of a token and end before the last one does, so tokens cannot
be compared: the end of the row is decoded and searched. A text that the prompt begins and a new token completes
counts, as in `transformers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lathe.generate.tail import is_byte, last_ids, whole_characters
from lathe.text.tokenizer import Tokenizer

# Tokens decoded in front of where the longest text may begin: one to be cut into, and a few that decode to nothing.
_BEFORE = 4


class StopStrings:
    """Some texts, and the tokenizer that they are looked for with."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self._reach = max(len(each.encode("utf-8")) for each in self.strings) + _BEFORE

    def completed(self, ids: Sequence[int]) -> str | None:
        """The text that the last token completes."""
        # Special tokens count: a text may be one. The model's table may have more rows than there are tokens.
        tail = last_ids(self.tokenizer, ids, self._reach, skip=False)
        before, text = whole_characters(self.tokenizer, tail[:-1]), self.tokenizer.decode(tail, False, errors="replace")
        differ = (place for place, (a, b) in enumerate(zip(before, text)) if a != b)
        known = next(differ, min(len(before), len(text)))
        for each in self.strings:
            if text.find(each, max(0, known - len(each) + 1)) >= 0:
                return each
        return None

    def ends(self, ids_BT: Tensor, pads_B: Tensor) -> Tensor:
        """Which rows' last tokens complete one, B of bool."""
        start = max(0, ids_BT.shape[1] - self._reach)
        if any(is_byte(self.tokenizer, number) for number in ids_BT[:, start].tolist()):
            start = 0  # a row of bytes may begin anywhere
        rows = zip(ids_BT[:, start:].tolist(), (pads_B - start).tolist())
        return torch.tensor(
            [self.completed(ids[max(0, pads) :]) is not None for ids, pads in rows], device=ids_BT.device
        )
