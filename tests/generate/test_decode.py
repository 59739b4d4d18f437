"""The loop against `transformers`: layout, lengths, ends; seeds; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lathe
from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.generate import generate
from tests.generate.models import TWINS, VOCABULARY, random_model, sampler, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTHS = (7, 4, 6)


@pytest.fixture(scope="module", params=TWINS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, lathe.Model]:
    return twins(request.param)


@pytest.fixture(scope="module")
def gpt2() -> lathe.Model:
    return sampler("gpt2")


@pytest.fixture(scope="module")
def t5() -> lathe.Model:
    return sampler("t5")


def prompts(architecture: Architecture, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Three rows of different lengths, padded on one side, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.full((2, 3, max(LENGTHS)), architecture.tokens.pad or 0)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        where = slice(-n, None) if side == "left" else slice(0, n)
        ids[row, where] = torch.randint(5, VOCABULARY, (n,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def second_choice(model: lathe.Model, batch: dict[str, Tensor], column: int) -> int:
    """The token that the middle row's free greedy text has at `column` of the new ones."""
    free = model.generate(**batch, max_new_tokens=10, eos_token_id=None, forced_eos_token_id=None)
    return int(free[1, free.shape[1] - 10 + column])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 12},
        {},
        {"max_length": 18},
        {"max_new_tokens": 1},
        {"max_new_tokens": 9, "eos_token_id": None, "forced_eos_token_id": None},
        {"max_new_tokens": 9, "forced_bos_token_id": 9},
        {"max_new_tokens": 9, "forced_eos_token_id": 9},
        {"max_new_tokens": 9, "num_beams": 1, "use_cache": True, "do_sample": False},
    ],
    ids=str,
)
def test_greedy_text_is_transformers_own(pair: tuple[Any, lathe.Model], settings: dict[str, Any]) -> None:
    theirs, ours = pair
    batch = prompts(ours.architecture)
    assert torch.equal(ours.generate(**batch, **settings), theirs.generate(**batch, **settings))
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert torch.equal(ours.generate(**one, **settings), theirs.generate(**one, **settings))


@pytest.mark.parametrize(
    "more",
    [{}, {"pad_token_id": 3}, {"min_new_tokens": 5}, {"min_length": 9}, {"max_new_tokens": 4}],
    ids=str,
)
def test_rows_end_as_in_transformers(pair: tuple[Any, lathe.Model], more: dict[str, Any]) -> None:
    """One row meets its end early; the others go on, or all have ended before the full length."""
    theirs, ours = pair
    batch = prompts(ours.architecture)
    for ends in ([second_choice(ours, batch, 2)], [second_choice(ours, batch, c) for c in (0, 2)]):
        settings: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": ends, **more}
        out = ours.generate(**batch, **settings)
        assert torch.equal(out, theirs.generate(**batch, **settings))


def test_it_stops_when_every_row_has_ended(gpt2: lathe.Model) -> None:
    batch = prompts(gpt2.architecture)
    first = gpt2.generate(**batch, max_new_tokens=1)[:, -1]
    out = gpt2.generate(**batch, max_new_tokens=20, eos_token_id=first.tolist())
    assert out.shape == (3, max(LENGTHS) + 1)


def test_pads_may_stand_on_either_side(pair: tuple[Any, lathe.Model]) -> None:
    """On the right, the new tokens are the same; what comes back starts with the prompt as it was given."""
    ours = pair[1]
    left, right = prompts(ours.architecture, "left"), prompts(ours.architecture, "right")
    settings: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "forced_eos_token_id": None}
    from_left, from_right = ours.generate(**left, **settings), ours.generate(**right, **settings)
    if ours.architecture.encoder is None:
        assert torch.equal(from_right[:, : max(LENGTHS)], right["input_ids"])
        assert torch.equal(from_right[:, max(LENGTHS) :], from_left[:, max(LENGTHS) :])
    for row, n in enumerate(LENGTHS):
        alone = ours.generate(right["input_ids"][row : row + 1, :n], **settings)
        assert torch.equal(alone[0, -8:], from_right[row, -8:])


def test_the_mask_is_made_from_the_pads_where_it_is_left_out(pair: tuple[Any, lathe.Model]) -> None:
    theirs, ours = pair
    batch = prompts(ours.architecture)
    del batch["attention_mask"]
    out = ours.generate(**batch, max_new_tokens=6)
    assert torch.equal(out, ours.generate(**prompts(ours.architecture), max_new_tokens=6))
    if ours.architecture.encoder is None:  # transformers 5 looks for pads in a decoder's prompt alone, 4 in any
        assert torch.equal(out, theirs.generate(**batch, max_new_tokens=6))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_without_a_prompt_starts_from_its_first_token(name: str) -> None:
    theirs, ours = twins(name)
    assert torch.equal(ours.generate(max_new_tokens=5), theirs.generate(max_new_tokens=5))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_goes_on_from_a_prompt_of_its_own(name: str) -> None:
    theirs, ours = twins(name)
    batch = prompts(ours.architecture)
    start = ours.architecture.tokens.decoder_start
    assert start is not None
    given = torch.tensor([[7, 8, 9], [10, 11, 12], [13, 14, 15]])
    for ids in (given, torch.cat((torch.full((3, 1), start), given), 1)):
        out = ours.generate(**batch, decoder_input_ids=ids, max_new_tokens=6)
        assert torch.equal(out, theirs.generate(**batch, decoder_input_ids=ids, max_new_tokens=6))
    other = ours.generate(**batch, decoder_start_token_id=9, max_new_tokens=6)
    assert torch.equal(other, theirs.generate(**batch, decoder_start_token_id=9, max_new_tokens=6))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_such_prompts_may_be_ragged(name: str) -> None:
    """T5's start token is its padding token, and so stands in front of a row that is padded on the left."""
    ours = twins(name)[1]
    batch = prompts(ours.architecture, "right")
    given = prompts(ours.architecture, "left", seed=1)
    out = ours.generate(
        **batch, **{f"decoder_{key}": value for key, value in given.items()}, max_new_tokens=6, eos_token_id=None
    )
    for row, n in enumerate(LENGTHS):
        alone = ours.generate(
            batch["input_ids"][row : row + 1, :n],
            decoder_input_ids=given["input_ids"][row : row + 1, -n:],
            max_new_tokens=6,
            eos_token_id=None,
        )
        assert torch.equal(out[row, -6:], alone[0, -6:])


def test_the_settings_stored_with_a_model_are_where_it_starts_from(gpt2: lathe.Model) -> None:
    batch = prompts(gpt2.architecture)
    model = lathe.Model(gpt2.architecture, gpt2.tensors(), generation={"max_new_tokens": 3, "top_k": 0})
    assert torch.equal(model.generate(**batch), gpt2.generate(**batch, max_new_tokens=3))
    assert torch.equal(model.generate(**batch, max_new_tokens=5), gpt2.generate(**batch, max_new_tokens=5))


# Sampling


def draw(model: lathe.Model, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    free = {"max_new_tokens": 12, "eos_token_id": None, "forced_eos_token_id": None, "do_sample": True, "top_k": None}
    return model.generate(**batch, **{**free, **settings})[:, -12:]


def test_a_seed_gives_the_same_text_and_another_another(gpt2: lathe.Model) -> None:
    batch = prompts(gpt2.architecture)
    assert torch.equal(draw(gpt2, batch, seed=1), draw(gpt2, batch, seed=1))
    assert not torch.equal(draw(gpt2, batch, seed=1), draw(gpt2, batch, seed=2))
    torch.manual_seed(4)
    unseeded = draw(gpt2, batch)
    torch.manual_seed(4)
    assert torch.equal(unseeded, draw(gpt2, batch))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_rows_text_is_its_own_seeds_whatever_stands_beside_it(name: str, request: pytest.FixtureRequest) -> None:
    model: lathe.Model = request.getfixturevalue(name)
    batch = prompts(model.architecture, "right")
    together = draw(model, batch, seed=[5, 6, 7], num_return_sequences=2, temperature=1.5)
    for row, (n, seed) in enumerate(zip(LENGTHS, (5, 6, 7))):
        alone = {"input_ids": batch["input_ids"][row : row + 1, :n]}
        drawn = draw(model, alone, seed=seed, num_return_sequences=2, temperature=1.5)
        assert torch.equal(drawn, together[2 * row : 2 * row + 2])
    assert torch.equal(draw(model, batch, seed=[5, 0, 1])[0], draw(model, batch, seed=[5, 2, 3])[0])


def test_a_row_that_ends_does_not_move_the_others_draws(gpt2: lathe.Model) -> None:
    batch = prompts(gpt2.architecture)
    free = draw(gpt2, batch, seed=3)
    only_here = next(int(t) for t in free[0] if t not in free[1] and t not in free[2])
    ended = draw(gpt2, batch, seed=3, eos_token_id=only_here)
    assert torch.equal(ended[1:], free[1:])
    end = free[0].tolist().index(only_here)
    assert ended[0].tolist() == free[0, : end + 1].tolist() + [0] * (11 - end)


def test_copies_of_a_prompt_lie_side_by_side_and_differ(gpt2: lathe.Model) -> None:
    batch = prompts(gpt2.architecture)
    out = gpt2.generate(**batch, do_sample=True, num_return_sequences=3, seed=0, max_new_tokens=12)
    assert out.shape[0] == 9
    assert torch.equal(out[:, : max(LENGTHS)], batch["input_ids"].repeat_interleave(3, dim=0))
    assert len(out[:3].unique(dim=0)) == 3


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_sampling_that_leaves_one_token_is_greedy(gpt2: lathe.Model, settings: dict[str, Any]) -> None:
    batch = prompts(gpt2.architecture)
    assert torch.equal(draw(gpt2, batch, seed=0, **settings), gpt2.generate(**batch, max_new_tokens=12)[:, -12:])


def test_first_tokens_are_drawn_as_often_as_the_model_says(gpt2: lathe.Model) -> None:
    """4,000 draws against the forward's own probabilities: each within five standard deviations."""
    prompt, n = torch.tensor([[9, 8, 7]]), 4000
    with torch.no_grad():
        p = (gpt2(prompt).logits[0, -1] / 2.0).softmax(-1)
    out = gpt2.generate(
        prompt, do_sample=True, temperature=2.0, top_k=None, seed=0, max_new_tokens=1, num_return_sequences=n
    )
    counts = torch.bincount(out[:, -1], minlength=VOCABULARY)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


# The model


def test_dropout_is_off_meanwhile_and_the_mode_comes_back(gpt2: lathe.Model) -> None:
    batch = prompts(gpt2.architecture)
    expected = gpt2.generate(**batch, max_new_tokens=8)
    model = lathe.Model(gpt2.architecture.with_({"dropout.hidden": 0.5}), gpt2.tensors()).train()
    model.head.eval()
    assert torch.equal(model.generate(**batch, max_new_tokens=8), expected)
    assert [name for name, module in model.named_children() if not module.training] == ["head"]
    assert model.training


def test_the_ids_can_be_trained_on(gpt2: lathe.Model) -> None:
    out = gpt2.generate(torch.tensor([[5, 6]]), max_new_tokens=4)
    assert not out.requires_grad
    loss = gpt2(out, labels=out).loss
    loss.backward()
    gpt2.zero_grad()
    assert loss.isfinite()


def test_a_model_with_a_pooler_beside_its_language_head_generates(gpt2: lathe.Model) -> None:
    """Its pooler would read an end-of-sequence token that no step has."""
    pooled = gpt2.architecture.with_({"head.pooler": {"token": "eos"}})
    assert generate(random_model(pooled), torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


# Bad input

IDS = torch.tensor([[5, 6, 7]])


def test_a_prompt_of_whatever_length_the_positions_hold(gpt2: lathe.Model) -> None:
    """32 positions: the last new token is never read, and needs none."""
    prompt = torch.full((1, 30), 5)
    assert gpt2.generate(prompt, max_new_tokens=3).shape == (1, 33)
    assert gpt2.generate(prompt).shape[1] <= 32
    with pytest.raises(
        RequestError, match="the prompt has 30 tokens: with 4 new ones they are more than this model's 32 positions"
    ):
        gpt2.generate(prompt, max_new_tokens=4)
    with pytest.raises(RequestError, match="at most 0 new ones fit"):
        gpt2.generate(torch.full((1, 33), 5), max_new_tokens=1)
    with pytest.raises(RequestError, match="33 tokens, which leaves no room within the model's 32 positions; use a"):
        gpt2.generate(torch.full((1, 33), 5))


def test_pads_take_no_room(gpt2: lathe.Model) -> None:
    """20 tokens of 40 columns: as much is added as to the row alone, and is the same."""
    row = torch.arange(5, 25)[None]
    padded, mask = torch.cat((torch.zeros_like(row), row), 1), torch.cat((torch.zeros_like(row), row**0), 1)
    alone = gpt2.generate(row, eos_token_id=None, pad_token_id=0)
    assert alone.shape == (1, 32)
    assert torch.equal(gpt2.generate(padded, mask, eos_token_id=None, pad_token_id=0)[:, 20:], alone)


def test_a_prompt_past_the_length_that_a_rotary_model_names_says_how_to_go_on() -> None:
    sizes: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 4, "d_ff": 8}
    model = lathe.Model(lathe.preset("llama-2-7b").with_({**sizes, "vocab_size": 30, "max_positions": 16}), seed=0)
    with pytest.raises(RequestError, match="no room within the model's 16 positions; pass max_new_tokens or shorten"):
        model.generate(torch.full((1, 16), 5))
    assert model.generate(torch.full((1, 16), 5), max_new_tokens=3, eos_token_id=None).shape == (1, 19)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "expected a prompt of at least one token"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "expected a prompt of at least one token"),
        ({"input_ids": torch.tensor([5, 6])}, "expected batch × length"),
        ({"input_ids": torch.tensor([[5.0, 6.0]])}, "expected whole numbers"),
        ({"input_ids": [[5, 6]]}, "input_ids is a list: expected a tensor"),
        ({"input_ids": torch.tensor([[5, 61]])}, "token id 61 at row 0, position 1 is outside the vocabulary of 61"),
        ({"input_ids": torch.tensor([[5, -1]])}, "token id -1 at row 0, position 1"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, "expected its shape, (1, 3)"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, "the mask of input_ids is list"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 2, 1]])}, "other numbers than 0 and 1"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[0.0, 0.5, 1.0]])}, "other numbers than 0 and 1"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(1, 3)}, "row 0 of input_ids is masked as a whole"),
        ({"input_ids": torch.tensor([[5, 6], [0, 0]])}, "row 1 of input_ids is masked as a whole"),
        (
            {"input_ids": IDS, "max_length": 3},
            "3 tokens, which leaves no room within max_length=3; raise it",
        ),
        ({"input_ids": IDS, "decoder_input_ids": IDS}, "this model has no encoder; pass its prompt as input_ids"),
        ({"input_ids": IDS, "token_type_ids": IDS}, "unknown setting 'token_type_ids'"),
        ({"bos_token_id": None}, "no prompt and no bos_token_id"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_bad_prompt_is_one_line(gpt2: lathe.Model, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        gpt2.generate(**inputs)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "an encoder-decoder reads input_ids and none were given"),
        ({"input_ids": IDS, "decoder_start_token_id": None}, "no decoder_start_token_id"),
        ({"input_ids": IDS, "decoder_input_ids": IDS[:, :0]}, "decoder_input_ids has shape (1, 0)"),
        ({"input_ids": IDS, "decoder_input_ids": IDS.repeat(2, 1)}, "decoder_input_ids has 2 rows and input_ids 1"),
        ({"input_ids": IDS, "decoder_input_ids": torch.tensor([[99]])}, "token id 99 at row 0"),
    ],
)
def test_a_bad_encoder_input_is_one_line(t5: lathe.Model, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        t5.generate(**inputs)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("preset", "changes", "says"),
    [
        ("bert-base-uncased", {}, "an encoder alone and cannot generate"),
        ("gpt2", {"head.language": None}, "no language head"),
        ("gpt2", {"decoder.causal": False}, "looks ahead"),
    ],
)
def test_a_model_that_cannot_generate_says_why(preset: str, changes: dict[str, Any], says: str) -> None:
    small = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "d_ff": 8}
    model = lathe.Model(lathe.preset(preset).with_(small).with_(changes))
    with pytest.raises(RequestError) as error:
        model.generate(IDS)
    assert says in str(error.value)
