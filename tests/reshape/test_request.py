"""What a resize is asked: words that would do nothing are refused, and those that may do something are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.reshape.opening import open_job
from lathe.reshape.request import read_request
from tests.reshape.test_search import shape
from tests.reshape.test_width import text

WORDS: list[dict[str, Any]] = [{"search": 20}, {"refit": True}, {"refit": False}, {"method": "select"}, {"search": 0}]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("changes", [{"d_ff": 16}, {"d_model": 48}, {"d_model": 24, "d_ff": 16}])
def test_words_on_how_a_width_is_cut_need_one_that_is(
    words: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    model = lathe.Model(shape("llama"), seed=0)
    (name, value), told = *words.items(), "this says how a width is cut, and none is cut here"
    with pytest.raises(RequestError, match=f"^{name}={value}: {told}"):
        lathe.resize(model, **changes, **words, calibrate=[text(model.architecture)["input_ids"]])
    model.save(tmp_path / "llama")
    with pytest.raises(RequestError, match=f"^{name}={value}: {told}"):
        open_job(read_request(str(tmp_path / "llama"), {**changes, **words}))


def test_several_words_are_named_together() -> None:
    with pytest.raises(RequestError, match=r"^method=truncate refit=True: these say .* leave out method and refit$"):
        read_request("model", {"d_ff": 16, "method": "truncate", "refit": True}).check_use(shape("llama"))


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("changes", [{"d_model": 16}, {"d_model": 16, "d_ff": 48}, {"d_embed": 8}])
def test_they_stay_where_a_width_is_cut(words: dict[str, Any], changes: dict[str, int]) -> None:
    preset = "albert-base-v2" if "d_embed" in changes else "llama-3.2-1b"
    sizes = {"d_model": 24, "d_ff": 32, "n_heads": 2, "n_layers": 2}
    source = lathe.preset(preset).with_(sizes | ({"d_embed": 12} if "d_embed" in changes else {"n_kv_heads": 2}))
    read_request("model", changes | words).check_use(source)


def test_a_budget_may_cut_a_width_or_not() -> None:
    words = {"max_parameters": 1000, "calibrate": "text.txt", "d_ff": 16, "method": "select"}
    read_request("model", words).check_use(shape("llama"))


def test_a_stage_that_cuts_no_width_is_no_error() -> None:
    model = lathe.Model(shape("llama"), seed=0)
    ids = text(model.architecture)["input_ids"]
    # As the second of two stages, in which the width is what it shall be already.
    done = lathe.reshape.resize(model, {"d_model": 24, "d_ff": 16}, calibrate=[{"input_ids": ids}], method="select")
    assert done.architecture.encoder is None
    assert torch.isfinite(done.model()(input_ids=ids).logits).all()
