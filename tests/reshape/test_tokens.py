"""Which positions count: pads and what no mask tells apart from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lathe
from lathe.architecture import Architecture, Classifier, Head, Pooler
from lathe.errors import RequestError
from lathe.reshape import resize
from lathe.reshape.calibrate import moments
from lathe.reshape.divergence import Divergence
from lathe.reshape.walk import split
from tests.reshape.test_width import build, text

_SIZES = {"d_model": 24, "d_ff": 32, "d_head": 12, "n_heads": 2, "n_layers": 1, "vocab_size": 60}


def shape(preset: str, **changes: Any) -> Architecture:
    return lathe.preset(preset).with_({**_SIZES, **changes})


def pairs(model: lathe.Model | Any) -> dict[str, dict[str, torch.Tensor]]:
    """Four rows of 3 tokens of 12 that are read and 9 of 12 that are written, told in several ways."""
    draw = torch.Generator().manual_seed(0)
    read, written = torch.randint(2, 60, (2, 4, 12), generator=draw)
    mask = (torch.arange(12) < 3).long().expand(4, 12).contiguous()
    labels = written.masked_fill(torch.arange(12) >= 9, -100)
    asked = {"input_ids": read, "attention_mask": mask, "labels": labels}
    given = {**asked, "decoder_input_ids": model.shift_right(labels)}
    return {
        "labels": asked,
        "labels, another length": {**asked, "input_ids": read[:, :8], "attention_mask": mask[:, :8]},
        "decoder_input_ids": given,
        "a mask": {**given, "decoder_attention_mask": (labels != -100).long()},
    }


@pytest.mark.parametrize("told", ["labels", "labels, another length", "decoder_input_ids", "a mask"])
def test_each_side_counts_its_own_tokens(told: str):
    model = build(shape("t5-small"))
    norms = ["encoder.norm", "decoder.attention.0.norm", "decoder.cross_attention.0.norm", "decoder.norm"]
    counted = moments(model, [pairs(model)[told]], norms).tokens
    assert counted == {"encoder.norm": 12, **dict.fromkeys(norms[1:], 36)}


def test_labels_that_are_all_ignored_leave_a_decoder_without_text():
    model = build(shape("t5-small"))
    asked = pairs(model)["labels"]
    with pytest.raises(RequestError, match=r"no token that passes decoder.* are all labels ignored"):
        resize(model, {"d_model": 12}, calibrate=[{**asked, "labels": torch.full_like(asked["labels"], -100)}])


def test_what_lifts_the_embeddings_counts_both_sides():
    model = build(shape("t5-small", d_embed=12))
    assert moments(model, [pairs(model)["a mask"]], ["embedding.projection"]).tokens == {"embedding.projection": 48}


def test_however_the_decoders_tokens_are_told_the_cut_is_the_same():
    model = build(shape("t5-small"))
    ways = pairs(model)
    cuts = [
        resize(model, {"d_model": 12, "d_ff": 16}, calibrate=[ways[told]] * 4).tensors for told in ("labels", "a mask")
    ]
    for name, tensor in cuts[0].items():
        torch.testing.assert_close(tensor, cuts[1][name], msg=name)


@pytest.mark.parametrize("changes", [{"d_model": 16}, {"d_embed": 12}])
def test_pads_fit_nothing(changes: dict[str, int]):
    architecture = lathe.preset("bert-base-uncased", head="masked").with_(_SIZES)
    model, batch = build(architecture), text(architecture, rows=64)
    ids, full = batch["input_ids"], torch.ones_like(batch["input_ids"])
    padded = {"input_ids": nn.functional.pad(ids, (0, 20)), "attention_mask": nn.functional.pad(full, (0, 20))}
    bare, with_pads = (
        resize(model, changes, calibrate=[each]).tensors for each in ({**batch, "attention_mask": full}, padded)
    )
    for name, tensor in bare.items():
        torch.testing.assert_close(tensor, with_pads[name], rtol=1e-6, atol=1e-8, msg=name)


def test_a_two_sided_classifier_is_cut_on_labelled_rows_and_on_plain_ids():
    head = Head(classifier=Classifier(n_labels=3), pooler=Pooler(token="eos"))
    architecture = shape("t5-small", head=head)
    ids = text(architecture)["input_ids"]
    labelled = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(16, dtype=torch.long)}
    model = lathe.Model(architecture, seed=0)
    for calibrate in ([labelled], [ids]):
        small = lathe.resize(model, d_model=16, calibrate=calibrate)
        assert small(**labelled).logits.shape == (16, 3)


def test_marks_on_pads_are_not_compared():
    architecture = lathe.preset("bert-base-uncased").with_(_SIZES)
    architecture = architecture.with_({"head": Head(classifier=Classifier(n_labels=1), pooler=Pooler(token="each"))})
    model, child, batch = build(architecture), build(architecture, seed=1), text(architecture)
    ids, full = batch["input_ids"], torch.ones_like(batch["input_ids"])
    padded = {"input_ids": nn.functional.pad(ids, (0, 20)), "attention_mask": nn.functional.pad(full, (0, 20))}
    bare, with_pads = (
        Divergence(model, [each], torch.eye(24).double())(child) for each in ({**batch, "attention_mask": full}, padded)
    )
    assert bare == pytest.approx(with_pads, rel=1e-9)


def test_however_long_the_rows_some_are_held_out():
    fitted, held = split([{"input_ids": torch.zeros(1, 10_000)} for _ in range(20)], 65_536)
    assert sum(len(each["input_ids"]) for each in fitted) == 7
    assert sum(len(each["input_ids"]) for each in held) == 1
