"""Rows of ids of different lengths, as the rectangular tensors that a model takes.

Short rows are filled up with the padding token, and `attention_mask` says which positions are real (1) and which
are padding (0). A model that writes on from the end of a text wants the padding on the left, so that the next
token follows the last real one; for the rest it is usual on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lathe.errors import RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Side = Literal["left", "right"]
Padding = Literal["longest", "max_length"] | bool | int | None


class Batch(dict[str, "Tensor"]):
    """Tensors by the names that a model's arguments have, so that `model(**batch)` works.

    `input_ids`, `attention_mask` and, for models that take them, `token_type_ids`: int64, (B, T). Each is an
    attribute too.
    """

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has {', '.join(self)}, not {name!r}") from None

    def to(self, device: torch.device | str | int) -> Batch:
        """The batch on another device."""
        return Batch({name: tensor.to(device) for name, tensor in self.items()})


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    side: Side = "right",
    length: int | None = None,
    token_types: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Fill rows of ids up to one length.

    Args:
        rows: ids, a row for each text.
        pad_id: fills the short rows.
        side: where it is put.
        length: of every row in the end; default that of the longest.
        token_types: a row of types for each row of ids; padding has the type 0.

    Returns:
        `input_ids` and `attention_mask`, and `token_type_ids` if types were given: int64, (B, T).

    Raises:
        RequestError: no rows, a row longer than `length`, types that do not fit the ids.
    """
    import torch

    if not rows:
        raise RequestError("there is no text in this batch: give at least one")
    longest = max(range(len(rows)), key=lambda number: len(rows[number]))
    width = len(rows[longest]) if length is None else length
    if len(rows[longest]) > width:
        raise RequestError(
            f"text {longest} has {len(rows[longest])} tokens, more than the {width} to pad to: pad to more, or pass "
            "truncation=True"
        )
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    types_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        here = slice(start, start + len(row))
        ids_BT[number, here] = torch.tensor(row, dtype=torch.int64)
        mask_BT[number, here] = 1
        if token_types is not None:
            if len(token_types[number]) != len(row):
                raise RequestError(f"text {number} has {len(row)} tokens and {len(token_types[number])} token types")
            types_BT[number, here] = torch.tensor(token_types[number], dtype=torch.int64)
    batch = Batch({"input_ids": ids_BT, "attention_mask": mask_BT})
    if token_types is not None:
        batch["token_type_ids"] = types_BT
    return batch


def row_length(padding: Padding, truncation: bool, max_length: int | None) -> int | None:
    """The length to fill rows up to, as a tokenizer is asked for it; None for that of the longest row.

    Raises:
        RequestError: arguments that say nothing, or contradict each other.
    """
    if max_length is None and (truncation or padding == "max_length"):
        asked = "truncation=True" if truncation else "padding='max_length'"
        raise RequestError(f"{asked} needs max_length: say how many tokens a row may have")
    if max_length is not None and max_length < 1:
        raise RequestError(f"max_length={max_length}: expected at least 1")
    if max_length is not None and not truncation and padding != "max_length":
        raise RequestError(f"max_length={max_length} does nothing without truncation=True or padding='max_length'")
    if padding == "max_length":
        return max_length
    if isinstance(padding, bool) or padding is None or padding == "longest":
        return None
    if not isinstance(padding, int) or padding < 1:
        raise RequestError(f"padding={padding!r}: expected 'longest', 'max_length', a length of at least 1, or None")
    return padding


def share(room: int, first: int, second: int) -> tuple[int, int]:
    """How many tokens each text of a pair keeps where there is room for so many: the longer text is cut first."""
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)
