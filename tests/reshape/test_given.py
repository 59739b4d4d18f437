"""Batches that a caller hands over: what is added to them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.reshape.given import given_batch

SIZES = {"d_model": 16, "d_ff": 24, "n_layers": 1, "n_heads": 2, "d_head": 8, "vocab_size": 40}
IDS = torch.tensor([[5, 6, 7, 8], [9, 0, 10, 0], [11, 1, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])


def model(preset: str, **tokens: Any) -> lathe.Model:
    architecture = lathe.preset(preset).with_(SIZES)
    return lathe.Model(architecture.with_({"tokens": {**architecture.tokens.to_dict(), **tokens}}), seed=0)


def test_ids_that_end_in_pads_are_masked_there_alone():
    made = given_batch(model("gpt2", pad=0, eos=[1]), IDS)
    assert made.keys() == {"input_ids", "attention_mask"}
    assert made["attention_mask"].tolist() == REAL.tolist()
    assert given_batch(model("gpt2", pad=None, eos=[1]), IDS).keys() == {"input_ids"}
    assert given_batch(model("gpt2", pad=0, eos=[1]), IDS[:1]).keys() == {"input_ids"}


def test_where_the_pad_ends_texts_one_of_them_is_text():
    made = given_batch(model("gpt2", pad=0, eos=[0]), IDS)
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize("given", [IDS, {"input_ids": IDS, "attention_mask": REAL}])
def test_a_model_that_reads_and_writes_writes_what_it_reads(given: Any):
    made = given_batch(model("t5-small", pad=0), given)
    assert made["labels"].tolist() == IDS.masked_fill(REAL == 0, -100).tolist()
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert given_batch(model("t5-small", pad=0), given) is given


def test_ids_of_another_whole_type_are_ids():
    made = given_batch(model("gpt2", pad=None), IDS.to(torch.uint8))["input_ids"]
    assert made.dtype == torch.int64
    assert torch.equal(made, IDS)


def test_padded_rows_fit_a_cut_as_their_texts_do():
    parent, draw = model("gpt2", pad=0, eos=[1]), torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (40, 12), generator=draw)
    padded = torch.nn.functional.pad(ids, (0, 30))
    one, other = (lathe.resize(parent, d_ff=12, calibrate=[each]).tensors() for each in (ids, padded))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["hello world"], "one is a str"),
        ([1, 2], "one is a int"),
        ([{"input_ids": [1, 2]}], "one is a dict"),
        (None, "it is a NoneType"),
        ([IDS.float()], "token ids are whole numbers, and a batch holds torch.float32"),
        ([IDS[:0]], "a batch of 0 × 4 token ids"),
    ],
)
def test_what_is_no_batch_is_one_line(given: Any, line: str):
    with pytest.raises(RequestError, match=line) as raised:
        lathe.resize(model("gpt2"), d_ff=12, calibrate=given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("work", [lathe.resize, lathe.quantize, lathe.plan_budget])
def test_a_name_is_no_model(work: Any):
    with pytest.raises(RequestError, match=r"expected a lathe.Model, not a str; lathe.load opens"):
        work("my-t5", calibrate=[IDS])
