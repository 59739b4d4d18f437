"""From prompts to text, with tokenizers of three kinds: bytes, pieces with a first token, pieces with an end token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.generate.single import Step
from lathe.generate.text import complete, spelled, stream
from lathe.text import Tokenizer, train_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog while seventeen rabbits watch from behind the garden wall",
    "to be or not to be that is the question whether tis nobler in the mind to suffer slings and arrows",
] * 12
PROMPTS = ["the quick", "to be or not to be that", "fox"]


def small(name: str) -> tuple[lathe.Model, Tokenizer]:
    """A random model of a family, and a tokenizer trained for it."""
    convention = {"gpt2": "gpt2", "llama-3.1-8b": "llama", "t5-small": "t5"}[name]
    sizes: dict[str, Any] = {"t5": {"sentinels": 4}}.get(convention, {})
    tokenizer = train_tokenizer(CORPUS, 320, convention=convention, **sizes)
    changes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size + 7, "n_layers": 1, "d_model": 16, "d_ff": 16}
    changes |= {"n_heads": 2, "d_head": 8} | ({"n_kv_heads": 1} if convention == "llama" else {})
    tokens = {
        "tokens.pad": tokenizer.pad_id,
        "tokens.bos": tokenizer.bos_id,
        "tokens.eos": [] if tokenizer.eos_id is None else [tokenizer.eos_id],
    }
    return lathe.Model(lathe.preset(name).with_({**tokens, **changes}), seed=1), tokenizer


@pytest.fixture(scope="module", params=["gpt2", "llama-3.1-8b", "t5-small"])
def made(request: pytest.FixtureRequest) -> tuple[lathe.Model, Tokenizer]:
    return small(request.param)


def test_a_batch_of_prompts_is_each_prompt_alone(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    together = complete(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert [each.prompt for each in together] == PROMPTS
    for prompt, found in zip(PROMPTS, together):
        (alone,) = complete(model, tokenizer, [prompt], max_new_tokens=8)
        assert (alone.text, alone.ids, alone.ended) == (found.text, found.ids, found.ended)
        assert alone.log_probs == pytest.approx(found.log_probs, abs=1e-4)
        assert len(found.ids) == 8 or found.ended


def test_the_ids_are_those_of_generate_and_the_text_theirs(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    (found,) = complete(model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    ids = tokenizer.encode(PROMPTS[0])
    row = model.generate(torch.tensor([ids]), max_new_tokens=8)[0].tolist()
    new = row[len(ids) :] if model.encoder is None else row[1:]
    assert found.ids == new[: len(found.ids)]
    if model.encoder is None:
        assert PROMPTS[0] + found.text == tokenizer.decode(row, errors="replace")
    else:
        assert found.text == tokenizer.decode(row, errors="replace")


def test_a_text_ends_at_its_end_token(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    (free,) = complete(model, tokenizer, PROMPTS[:1], max_new_tokens=8, eos_token_id=None)
    assert not free.ended
    stop = free.ids[3]
    (found,) = complete(model, tokenizer, PROMPTS[:1], max_new_tokens=8, eos_token_id=stop)
    assert found.ended
    assert found.ids == free.ids[: free.ids.index(stop) + 1]


def test_special_tokens_stay_where_they_are_asked_for(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    special = min(tokenizer.special_ids)
    (name,) = tokenizer.pieces([special])
    settings: dict[str, Any] = {"max_new_tokens": 3, "forced_eos_token_id": special}
    (hidden,) = complete(model, tokenizer, PROMPTS[:1], **settings)
    (shown,) = complete(model, tokenizer, PROMPTS[:1], keep_special_tokens=True, **settings)
    assert name not in hidden.text
    assert name in shown.text


def test_several_samples_of_a_prompt_lie_side_by_side(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    found = complete(model, tokenizer, PROMPTS[:2], do_sample=True, num_return_sequences=2, seed=0, max_new_tokens=6)
    assert [each.prompt for each in found] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert found[0].ids != found[1].ids


def test_the_pieces_of_a_stream_are_the_text(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    for settings in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "do_sample": True, "seed": 4, "top_k": None}):
        (whole,) = complete(model, tokenizer, PROMPTS[:1], **settings)
        pieces = list(stream(model, tokenizer, PROMPTS[0], **settings))
        assert "".join(pieces) == whole.text
    with pytest.raises(RequestError, match="num_beams=2, num_return_sequences=1: a text can be streamed where there"):
        next(stream(model, tokenizer, PROMPTS[0], num_beams=2))


def test_bytes_around_a_special_token_are_given_once_they_are_settled() -> None:
    _, tokenizer = small("t5-small")
    ids = [number for piece in ("<0x41>", "</s>", "<0xEA>") if (number := tokenizer.token_id(piece)) is not None]
    assert len(ids) == 3
    # Without the end mark an A stands before a byte that begins a character: spelled together both are unknown.
    assert tokenizer.decode(ids) == "\ufffd\ufffd"
    for keep in (False, True):
        chosen = (Step(torch.tensor([each]), torch.zeros(1), torch.tensor([False])) for each in ids)
        pieces = list(spelled(tokenizer, [], chosen, keep))
        assert "".join(pieces) == tokenizer.decode(ids, not keep)


@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_a_text_goes_on_after_a_prompt_that_ends_byte_by_byte(times: int) -> None:
    _, tokenizer = small("llama-3.1-8b")
    before, both = tokenizer.encode("to " + "한글" * times), tokenizer.encode("to " + "한글" * (times + 1))
    assert both[: len(before)] == before
    assert len(both) == len(before) + 6
    chosen = (Step(torch.tensor([each]), torch.zeros(1), torch.tensor([False])) for each in both[len(before) :])
    assert "".join(spelled(tokenizer, before, chosen)) == "한글"


def test_gradients_are_the_callers_own_between_two_pieces() -> None:
    model, tokenizer = small("gpt2")
    pieces = stream(model, tokenizer, PROMPTS[0], max_new_tokens=3)
    next(pieces)
    assert torch.is_grad_enabled()


def test_the_best_beams_come_with_their_scores(made: tuple[lathe.Model, Tokenizer]) -> None:
    model, tokenizer = made
    found = complete(model, tokenizer, PROMPTS[:2], num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert [each.prompt for each in found] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    for best, second in (found[:2], found[2:]):
        assert best.score >= second.score
        assert best.ids != second.ids
        assert len(best.log_probs) == len(best.ids)
        assert best.score == pytest.approx(sum(best.log_probs) / len(best.ids), rel=1e-4)


def test_a_text_ends_with_the_token_that_completes_a_stop_string(made: tuple[lathe.Model, Tokenizer]) -> None:
    """Wherever it begins; with beams too."""
    model, tokenizer = made
    beams: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2})
    for settings in beams:
        free = complete(model, tokenizer, PROMPTS, max_new_tokens=10, eos_token_id=None, **settings)
        text = next(each.text for each in free if len(each.text.strip()) > 6)
        stop = text.strip()[2:4]
        for each in complete(
            model, tokenizer, PROMPTS, max_new_tokens=10, eos_token_id=None, stop_strings=[stop], **settings
        ):
            if stop in each.text:
                assert each.ended
                assert stop not in tokenizer.decode(each.ids[:-1], False, errors="replace")
            else:
                assert len(each.ids) == 10


def test_prompts_without_tokens_are_refused() -> None:
    model, tokenizer = small("gpt2")
    with pytest.raises(RequestError, match="there is no prompt"):
        complete(model, tokenizer, [])
    with pytest.raises(RequestError, match="prompt 2 is '' and holds no token"):
        complete(model, tokenizer, ["to be", ""])


def test_a_tokenizer_of_another_model_is_named_as_such() -> None:
    model, tokenizer = small("gpt2")
    narrow = lathe.Model(model.architecture.with_({"vocab_size": 40, "tokens.eos": [], "tokens.bos": None}))
    with pytest.raises(RequestError, match="outside the vocabulary of 40; does the tokenizer belong to this model"):
        complete(narrow, tokenizer, ["to be"])
