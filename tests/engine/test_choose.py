"""Which of the two computes, what is said about it, and that the tokens are the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lathe
from lathe.engine import Engine, build, native
from lathe.engine.choose import reader
from lathe.errors import RequestError
from lathe.generate.continuous import decode_rows
from tests.generate.models import VOCABULARY, twins

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def tiny(**changes: Any) -> lathe.Model:
    sizes = {"d_model": 16, "d_ff": 32, "n_layers": 2, "n_heads": 2, "d_head": 8, "vocab_size": 64}
    return lathe.Model(lathe.preset("gpt2").with_({**sizes, "tokens.eos": [], "tokens.bos": None, **changes}), seed=0)


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours, theirs)


@needs_library
@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "seed": 3, "top_k": 9}],
    ids=["greedy", "beams", "sampled"],
)
def test_the_tokens_are_the_modules(name: str, settings: dict[str, Any]) -> None:
    model = twins(name)[1]
    ids_BT = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    both = [
        model.generate(ids_BT, mask_BT, max_new_tokens=12, engine=engine, **settings) for engine in ("native", "torch")
    ]
    assert torch.equal(*both)


@needs_library
def test_rows_that_take_turns_and_share_their_beginning_get_the_same_tokens() -> None:
    model, start = tiny(), list(range(20))
    prompts = [[*start, 30 + row, 31] for row in range(5)]
    both = [decode_rows(model, prompts, slots=2, max_new_tokens=6, engine=engine) for engine in ("native", "torch")]
    assert [row.ids for row in both[0]] == [row.ids for row in both[1]]


@needs_library
def test_a_changed_weight_is_seen() -> None:
    model, ids = tiny(), torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=8)
    with torch.no_grad():
        model.embedding.tokens.weight.copy_(torch.randn_like(model.embedding.tokens.weight))
    assert torch.equal(model.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8, engine="torch"))
    assert not torch.equal(model.generate(ids, max_new_tokens=8), before)
    model.get_submodule("decoder.feed_forward.0").up = nn.Linear(16, 32)
    assert torch.equal(model.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8, engine="torch"))


@needs_library
def test_what_the_native_step_cannot_hold_is_named_and_computed_by_the_modules() -> None:
    double = tiny().to(torch.float64)
    engine = Engine(double)
    assert not engine.native
    assert engine.reason is not None
    assert "float64" in engine.reason
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert same(engine(ids).logits, double(ids).logits)
    hooked = tiny()
    hooked.get_submodule("decoder.feed_forward.0.up").register_forward_hook(lambda *_: None)
    assert "hook" in str(Engine(hooked).reason)


@needs_library
def test_a_call_that_the_modules_have_to_serve_is_counted() -> None:
    model = tiny()
    engine = Engine(model)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 0, 1, 1]])
    with torch.no_grad():
        assert same(engine(ids, mask).logits, model(ids, mask).logits)
    assert engine.fallbacks == {"a row has pads between its tokens": 1}


@needs_library
def test_the_same_errors_are_raised() -> None:
    model = tiny(max_positions=4)
    engine = Engine(model)
    readers: list[Any] = [model, engine]
    for ids in (torch.tensor([[1, 64]]), torch.arange(5)[None], torch.tensor([[0.5]])):
        said = []
        for called in readers:
            with pytest.raises(RequestError) as caught:
                called(ids)
            said.append(str(caught.value))
        assert said[0] == said[1]


@needs_library
def test_a_weight_that_is_no_number_is_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("decoder.feed_forward.0.up.weight")[0, 0] = float("nan")
    with pytest.raises(RequestError, match=r"decoder\.feed_forward\.0\.up\.weight holds 1 values"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, engine="native")


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(RequestError, match="expected auto, native, torch"):
        reader(tiny(), "fast")
    with pytest.raises(RequestError, match="another model"):
        reader(tiny(), Engine(tiny()))
    with pytest.raises(RequestError, match="precision='int3'"):
        Engine(tiny(), "int3")
    with pytest.raises(RequestError, match="threads=0"):
        Engine(tiny(), threads=0)


def test_without_a_library_it_is_said_once_and_the_tokens_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny(), torch.tensor([[5, 6, 7]])
    expected: Tensor = model.generate(ids, max_new_tokens=5, engine="torch")
    (tmp_path / "_step.txt").write_text("no C++ compiler was found\n", encoding="utf-8")
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_step.so")
    monkeypatch.setattr(build, "REASON", tmp_path / "_step.txt")
    native.library.cache_clear()
    try:
        other = tiny()
        with caplog.at_level(logging.WARNING, logger="lathe"):
            for _ in range(2):
                assert torch.equal(other.generate(ids, max_new_tokens=5, engine="native"), expected)
            assert torch.equal(tiny().generate(ids, max_new_tokens=5), expected)
        said = [record.message for record in caplog.records]
        assert len(said) == 1
        assert "native step not built: no C++ compiler was found" in said[0]
    finally:
        native.library.cache_clear()
