"""Batches: padding on either side, masks, token types, cutting, and calls that contradict themselves."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.text import Batch, Tokenizer, pad
from tests.text.samples import trained, vocabulary_files

ROWS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5)


@given(ROWS, st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_the_mask_finds_every_row_again(rows: list[list[int]], side: Literal["left", "right"], more: int) -> None:
    length = max(map(len, rows)) + more
    batch = pad(rows, 0, side=side, length=length, token_types=[[1] * len(row) for row in rows])
    assert [ids[mask == 1].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)] == rows
    assert all(tensor.shape == (len(rows), length) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert torch.equal(batch.token_type_ids, batch.attention_mask)
    assert batch.input_ids[batch.attention_mask == 0].eq(0).all()
    # The real tokens stand together, at the side away from the padding.
    edge = batch.attention_mask.flip(1) if side == "left" else batch.attention_mask
    assert (edge.diff(dim=1) <= 0).all()


def test_a_batch_is_a_dictionary_with_attributes() -> None:
    batch = pad([[1, 2], [3]], 0)
    assert dict(**batch).keys() == {"input_ids", "attention_mask"}
    assert batch.input_ids is batch["input_ids"]
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert torch.equal(moved.input_ids, batch.input_ids)
    with pytest.raises(AttributeError, match="has input_ids, attention_mask, not 'labels'"):
        _ = batch.labels


def test_pad_refuses_what_does_not_fit() -> None:
    with pytest.raises(RequestError, match="no text in this batch"):
        pad([], 0)
    with pytest.raises(RequestError, match="text 1 has 3 tokens, more than the 2 to pad to"):
        pad([[1], [1, 2, 3]], 0, length=2)
    with pytest.raises(RequestError, match="text 0 has 2 tokens and 1 token types"):
        pad([[1, 2]], 0, token_types=[[0]])


def test_one_text_is_a_batch_of_one() -> None:
    tokenizer = trained("t5")
    assert tokenizer("The statement").input_ids.tolist() == [tokenizer.encode("The statement")]


@pytest.mark.parametrize(("convention", "uses"), [("bert", True), ("albert", True), ("t5", False), ("bart", False)])
def test_token_types_only_where_the_models_take_them(convention: str, uses: bool) -> None:
    tokenizer = trained(convention)
    batch = tokenizer(["a", "b b"], ["c c c", "d"])
    assert ("token_type_ids" in batch) == uses
    if uses:
        sep = [row.index(tokenizer.sep_id) for row in batch.input_ids.tolist()]
        for row, mask, end in zip(batch.token_type_ids.tolist(), batch.attention_mask.tolist(), sep):
            second = sum(mask) - end - 1
            assert row == [0] * (end + 1) + [1] * second + [0] * (len(row) - end - 1 - second)


@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 12))
def test_cutting_keeps_to_the_length_and_takes_from_the_longer_text(room: int, first: int, second: int) -> None:
    tokenizer = trained("bert")
    texts, pairs = ["a " * first], ["b " * second]
    whole = tokenizer.encode(texts[0], pairs[0])
    length = room + 3
    ids = tokenizer(texts, pairs, truncation=True, max_length=length).input_ids[0].tolist()
    assert len(ids) == min(len(whole), length)
    kept = (ids.count(tokenizer.token_id("a")), ids.count(tokenizer.token_id("b")))
    assert sum(kept) == min(first + second, room)
    if sum(kept) < first + second:
        shorter, longer = sorted([(first, kept[0]), (second, kept[1])])
        assert shorter[1] == shorter[0] or longer[1] - shorter[1] <= 1


def test_nothing_is_cut_unasked() -> None:
    long = "The statement is executed. " * 300
    tokenizer = trained("bert")
    assert len(tokenizer.encode(long)) > 1500
    assert tokenizer([long, "a"]).input_ids.shape[1] == len(tokenizer.encode(long))


def test_padding_to_a_length() -> None:
    tokenizer = trained("t5")
    assert tokenizer(["a", "b"], padding=9).input_ids.shape == (2, 9)
    assert tokenizer(["a", "b"], padding="max_length", max_length=9).input_ids.shape == (2, 9)
    assert tokenizer(["a"], padding=None).input_ids.tolist() == [tokenizer.encode("a")]
    assert torch.equal(tokenizer(["a", "b b"], padding=True).input_ids, tokenizer(["a", "b b"]).input_ids)


def test_a_tokenizer_without_a_padding_token_says_so() -> None:
    tokenizer = Tokenizer.from_files(vocabulary_files(trained("gpt2")), convention="gpt2")
    assert tokenizer.pad_id is None
    assert tokenizer("The").attention_mask.all()
    with pytest.raises(RequestError, match=r"names no padding token: pass pad_id, .*pad_id=0"):
        tokenizer(["The", "The statement"])
    batch = tokenizer(["The", "The statement"], pad_id=0)
    assert batch.input_ids[0, -1] == 0
    assert batch.attention_mask[0, -1] == 0
    with pytest.raises(RequestError, match="pad_id=500 is outside the vocabulary"):
        tokenizer(["The", "The statement"], pad_id=500)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"padding": None}, "from 2 to 3 tokens, and padding=None fills up nothing"),
    ({"padding": "long"}, "padding='long': expected 'longest'"),
    ({"padding": 0}, "padding=0: expected"),
    ({"padding": 2}, "text 1 has 3 tokens, more than the 2 to pad to"),
    ({"padding": "max_length"}, "padding='max_length' needs max_length"),
    ({"truncation": True}, "truncation=True needs max_length"),
    ({"max_length": 4}, "max_length=4 does nothing without truncation=True"),
    ({"truncation": True, "max_length": 0}, "max_length=0: expected at least 1"),
    ({"padding_side": "up"}, "padding_side='up'"),
    ({"pairs": ["one"]}, "2 texts and 1 second texts"),
    ({"pairs": ["one"], "truncation": True, "max_length": 9}, "2 texts and 1 second texts"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_calls_that_cannot_be_meant_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        trained("t5")(["a", "a b"], **arguments)


def test_no_room_for_what_stands_around_the_text() -> None:
    with pytest.raises(RequestError, match="3 tokens are set around the text"):
        trained("bert")(["a"], ["b"], truncation=True, max_length=2)


def test_no_texts() -> None:
    with pytest.raises(RequestError, match="no text in this batch"):
        trained("t5")([])
