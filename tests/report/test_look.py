"""What is shown is what the model computes, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.blueprint import count
from lathe.errors import RequestError
from lathe.report.look import _labels, lines, look, write_png
from lathe.text import Tokenizer, train_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog while seventeen rabbits watch from the garden wall"] * 12
TEXT = "the quick fox"
PRESETS = {
    "t5-small": {},
    "bart-base": {},
    "bert-base-uncased": {},
    "electra-small-discriminator": {},
    "albert-base-v2": {},
    "gpt2": {},
    "llama-3.1-8b": {"n_kv_heads": 1},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 300, convention="gpt2")


def small(name: str, tokenizer: Tokenizer) -> lathe.Model:
    sizes: dict[str, Any] = {"vocab_size": 310, "n_layers": 2, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": None, "tokens.pad": 0}
    return lathe.Model(lathe.preset(name).with_({**sizes, **tokens, **PRESETS[name]}), seed=1, tokenizer=tokenizer)


@pytest.mark.parametrize("name", PRESETS)
def test_scores_and_weights_are_the_models_own(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The softmax of the scores shown is the weights shown, and these are what the forward returns."""
    model = small(name, tokenizer)
    found = look(model, tokenizer, TEXT, layer=2)
    stacks = [stack for stack, _ in model.architecture.stacks]
    assert list(found["tokens"]) == stacks
    assert list(found["attention"]) == [*stacks, *(["cross"] if len(stacks) == 2 else [])]
    for kind in found["attention"].values():
        scores = torch.tensor([[[-torch.inf if s is None else s for s in row] for row in h] for h in kind["scores"]])
        torch.testing.assert_close(scores.softmax(-1), torch.tensor(kind["weights"]), rtol=1e-4, atol=1e-5)
    ids = tokenizer(TEXT)["input_ids"]
    assert [each["id"] for each in found["tokens"][stacks[0]]] == ids[0].tolist()
    norms = [each["vector_norm"] for each in found["tokens"][stacks[0]]]
    torch.testing.assert_close(torch.tensor(norms), model.vectors(ids, None)[0].detach().norm(dim=-1))
    assert sum(each["parameters"] for each in found["modules"]) == count(model.architecture)
    shown = "\n".join(lines(found, head=2))
    assert f"modules: {count(model.architecture):,} parameters" in shown
    assert "layer 2, head 2" in shown
    json.dumps(found, allow_nan=False)
    assert write_png(found, tmp_path / "look.png") == []
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_causal_model_hides_what_comes_later(tokenizer: Tokenizer) -> None:
    for head in look(small("gpt2", tokenizer), tokenizer, TEXT)["attention"]["decoder"]["scores"]:
        for place, row in enumerate(head):
            assert [score is None for score in row] == [later > place for later in range(len(row))]


def test_a_decoder_reads_the_target_or_what_the_model_writes(tokenizer: Tokenizer) -> None:
    model = small("t5-small", tokenizer)
    target = look(model, tokenizer, TEXT, target="the garden")["tokens"]["decoder"]
    assert [each["id"] for each in target] == [0, *tokenizer.encode("the garden")[:-1]]
    written = look(model, tokenizer, TEXT)["tokens"]["decoder"]
    ids = model.generate(tokenizer(TEXT)["input_ids"], max_new_tokens=8)
    assert [each["id"] for each in written] == ids[0].tolist()


def test_bad_requests_are_one_line(tokenizer: Tokenizer) -> None:
    model = small("gpt2", tokenizer)
    for given, says in (
        ({"text": ""}, "holds no token"),
        ({"text": "a", "layer": 3}, "layer=3: expected 1 to 2, the layers of the decoder"),
        ({"text": "a", "layer": 0}, "layer=0: expected 1 to 2"),
        ({"text": "a", "target": "b"}, "this model has one stack"),
    ):
        with pytest.raises(RequestError, match=says):
            look(model, tokenizer, **given)
    with pytest.raises(RequestError, match="--head 3: expected 1 to 2, the heads of the decoder"):
        list(lines(look(model, tokenizer, "a"), head=3))


def test_pieces_that_no_font_writes_are_named_and_drawn_as_their_places(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = look(small("bert-base-uncased", tokenizer), tokenizer, TEXT)
    private = ["\U0010fffd"]  # no font has a character there
    found["tokens"]["encoder"][1]["piece"] = private[0]
    assert write_png(found, tmp_path / "a.png") == private
    assert _labels(["fox", *private], private) == ["fox", "·1·"]


def test_dollars_are_drawn_as_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = look(small("bert-base-uncased", tokenizer), tokenizer, TEXT)
    for each, piece in zip(found["tokens"]["encoder"], ("$$", r"$\frac$", "_$_")):
        each["piece"] = piece
    assert write_png(found, tmp_path / "a.png") == []
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_text_is_drawn_in_a_picture_that_can_be_opened(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = look(small("bert-base-uncased", tokenizer), tokenizer, TEXT)
    (tokens,) = found["tokens"].values()
    found["tokens"] = {"encoder": (tokens * 300)[:300]}
    found["attention"] = {"encoder": {"weights": [[[0.0] * 300] * 300] * 9}}
    write_png(found, tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[16:24]
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
    assert width < 16_000
    assert height < 4_000
