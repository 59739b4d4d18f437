"""Rows that come and go: each is itself alone; places are freed, beginnings shared, memory kept to the plan."""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lathe
from lathe.errors import RequestError
from lathe.generate import decode
from lathe.generate.continuous import Row, decode_rows, rows_as_finished
from lathe.generate.memory import decoding_bytes
from lathe.generate.slots import Slots, plan_slots
from lathe.model.cache import Cache
from tests.generate.models import VOCABULARY, sampler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NAMES = ("gpt2", "llama", "t5", "bart")
# Every way to judge a token by the text, a draw, and lengths that differ from row to row.
HOWS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 6},
    {"max_new_tokens": 20},
    {"max_length": 14},
    {"max_new_tokens": 6, "do_sample": True, "top_k": None},
    {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "renormalize_logits": True},
    {"max_new_tokens": 7, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"max_new_tokens": 5, "forced_eos_token_id": 9, "begin_suppress_tokens": [7], "frequency_penalty": 0.5},
)

model_of = functools.cache(sampler)
prompts = st.lists(st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=6)


def ended_early(model: lathe.Model) -> tuple[int, ...]:
    """A tenth of the vocabulary ends a row, so that rows of random models leave at different steps."""
    return tuple(range(10, VOCABULARY, 10))


@pytest.mark.parametrize("name", NAMES)
@given(texts=prompts, alike=st.integers(0, 12), slots=st.integers(1, 4), how=st.sampled_from(HOWS), data=st.data())
@settings(max_examples=12)
def test_a_row_depends_on_no_other_on_no_number_of_places_and_on_no_order(
    name: str, texts: list[list[int]], alike: int, slots: int, how: dict[str, Any], data: st.DataObject
) -> None:
    model = model_of(name)
    # Some begin alike, with what is long enough to be waited for, or not.
    texts = [list(range(5, 5 + alike)) + text if at % 3 else text for at, text in enumerate(texts)]
    if model.encoder is None:  # what it reads and what it writes share its 32 positions
        texts = [text[: 13 if "max_length" in how else 32 - how["max_new_tokens"]] for text in texts]
    how = {**how, "eos_token_id": ended_early(model)}
    seeds = [100 + at for at in range(len(texts))]
    order = data.draw(st.permutations(range(len(texts))))
    found = decode_rows(
        model,
        [texts[at] for at in order],
        slots=slots,
        **how,
        **({"seed": tuple(seeds[at] for at in order)} if "do_sample" in how else {}),
    )
    assert [row.number for row in found] == list(range(len(texts)))
    for row, at in zip(found, order):
        alone = decode(
            model,
            torch.tensor([texts[at]]),
            torch.ones(1, len(texts[at]), dtype=torch.long),
            **{**how, **({"seed": (seeds[at],)} if "do_sample" in how else {})},
        )
        length = int(alone.lengths_R[0])
        assert row.ids == alone.sequences_RT[0, alone.n_prompt : alone.n_prompt + length].tolist()
        assert row.ended == bool(alone.ended_R[0])
        torch.testing.assert_close(torch.tensor(row.log_probs), alone.log_probs_RT[0, :length].float())


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_one_seed_are_those_of_the_batch_that_is_decoded_as_a_whole(name: str) -> None:
    model, ids = model_of(name), torch.randint(5, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "seed": 4}
    whole = decode(model, ids, torch.ones_like(ids), **how)
    rows = decode_rows(model, ids.tolist(), slots=2, **how)
    new_RT = whole.sequences_RT[:, whole.n_prompt :]
    assert [row.ids for row in rows] == [new[:n].tolist() for new, n in zip(new_RT, whole.lengths_R.tolist())]


BEAMS: tuple[dict[str, Any], ...] = (
    {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8},
    {"num_beams": 2, "max_length": 14, "length_penalty": -1.0, "early_stopping": True},
    {"num_beams": 2, "max_new_tokens": 6, "early_stopping": "never", "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "max_new_tokens": 6, "num_return_sequences": 3},
    {"num_beams": 2, "do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "num_return_sequences": 2},
)


@pytest.mark.parametrize("name", NAMES)
@given(texts=prompts, alike=st.integers(0, 20), slots=st.integers(1, 3), how=st.sampled_from(BEAMS), data=st.data())
@settings(max_examples=5)
def test_beams_that_take_turns_are_those_of_the_prompt_alone(
    name: str, texts: list[list[int]], alike: int, slots: int, how: dict[str, Any], data: st.DataObject
) -> None:
    model = model_of(name)
    # All begin alike, with what is long enough to be held once, or not; an encoder's sources come twice.
    texts = [list(range(5, 5 + alike)) + text for text in texts]
    texts = [*texts, *texts[:2]]
    if model.encoder is None:  # what it reads and what it writes share its 32 positions
        texts = [text[: 13 if "max_length" in how else 32 - how["max_new_tokens"]] for text in texts]
    how = {**how, "eos_token_id": ended_early(model)}
    order, copies = data.draw(st.permutations(range(len(texts)))), how.get("num_return_sequences", 1)
    seeded = "do_sample" in how
    found = decode_rows(
        model,
        [texts[at] for at in order],
        slots=slots,
        **how,
        **({"seed": tuple(100 + at for at in order)} if seeded else {}),
    )
    assert [row.number for row in found] == list(range(copies * len(texts)))
    for place, at in enumerate(order):
        ids = torch.tensor([texts[at]])
        own: dict[str, Any] = {**how, "seed": (100 + at,)} if seeded else how
        alone = decode(model, ids, torch.ones_like(ids), **own)
        for rank, row in enumerate(found[copies * place : copies * (place + 1)]):
            length = int(alone.lengths_R[rank])
            assert row.ids == alone.sequences_RT[rank, alone.n_prompt : alone.n_prompt + length].tolist()
            assert row.ended == bool(alone.ended_R[rank])
            assert row.score == pytest.approx(float(alone.scores_R[rank]), rel=1e-4, abs=1e-5)
            torch.testing.assert_close(torch.tensor(row.log_probs), alone.log_probs_RT[rank, :length].float())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_prompts_beams_leave_together_and_the_next_ones_take_their_rows(name: str) -> None:
    model, texts = model_of(name), [[5 + at, 9, 11 + at] for at in range(6)]
    # Ends that the first prompt's best text meets early, and the others' perhaps later.
    how: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, "early_stopping": True}
    (free,) = decode_rows(model, texts[:1], eos_token_id=None, forced_eos_token_id=None, **how)
    how |= {"eos_token_id": tuple(free.ids[2:4]), "forced_eos_token_id": None}
    with Reads(model) as reads:
        rows = decode_rows(model, texts, slots=2, **how)
    assert len({len(row.ids) for row in rows}) > 1
    steps = [count for count, columns in reads.shapes if columns == 1 and count > 2]
    assert set(steps) <= {3, 6}
    alone = 0
    for text in texts:
        with Reads(model) as reads:
            decode_rows(model, [text], slots=1, **how)
        alone += sum(count for count, columns in reads.shapes if count == 3)
    # No step reads a row of a search that is over.
    assert sum(steps) == alone


class Reads:
    """How many rows and columns each pass of a model reads."""

    def __init__(self, model: lathe.Model) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, args: Any, given: dict[str, Any]) -> None:
        ids = given["decoder_input_ids"] if "decoder_input_ids" in given else given["input_ids"]
        self.shapes.append(tuple(ids.shape))

    def __enter__(self) -> Reads:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_ends_frees_its_place_at_once(name: str) -> None:
    """No pass reads a row that has ended: all rows read over all steps are the tokens that there are."""
    model, texts = model_of(name), [[5 + at, 9, 11 + at] for at in range(7)]
    how: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": ended_early(model), "seed": 0, "do_sample": True}
    with Reads(model) as reads:
        rows = decode_rows(model, texts, slots=3, **how)
    lengths = [len(row.ids) for row in rows]
    assert len(set(lengths)) > 2
    # A pass gives each of its rows one token, and nobody else; three places are never passed.
    assert sum(rows for rows, _ in reads.shapes) == sum(lengths)
    assert max(rows for rows, _ in reads.shapes) == 3
    steps = [rows for rows, columns in reads.shapes if columns == 1]
    assert len(steps) < sum(max(lengths[at : at + 3]) for at in range(0, 7, 3)) + len(texts)


def test_rows_come_as_they_finish() -> None:
    model = model_of("gpt2")
    lengths: dict[str, Any] = {"max_length": 12}
    texts = [[5, 6], [7] * 10, [8] * 6]
    assert [row.number for row in rows_as_finished(model, texts, slots=3, **lengths, eos_token_id=None)] == [1, 2, 0]


@pytest.mark.parametrize("alike", [12, 20])
def test_a_beginning_that_prompts_share_is_computed_once(alike: int) -> None:
    """A short one is copied from place to place, a long one is held once."""
    model, beginning = model_of("gpt2"), list(range(10, 10 + alike))
    texts = [[*beginning, 5 + at, 30 + at] for at in range(6)]
    for slots in (1, 2, 6):
        with Reads(model) as reads:
            found = decode_rows(model, texts, slots=slots, max_new_tokens=2, eos_token_id=None)
        read = [rows * columns for rows, columns in reads.shapes if columns > 1]
        assert sum(read) == len(beginning) + 2 * len(texts)
        assert [row.ids for row in found] == [
            decode_rows(model, [text], max_new_tokens=2, eos_token_id=None)[0].ids for text in texts
        ]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_all_prompts_begin_with_is_held_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of(name), held_by(monkeypatch)
    how: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "slots": 5}
    decode_rows(model, [[*range(10, 28), 5 + at] for at in range(5)], **how)
    decode_rows(model, [[9 + at, *range(10, 27), 5 + at] for at in range(5)], **how)
    alike, different = (slots.plan for slots in made)
    assert (alike.shared, alike.tokens, different.shared, different.tokens) == (18, 4, 0, 22)
    each = decoding_bytes(model.architecture, 1, 1, 0, 0, 8) - decoding_bytes(model.architecture, 1, 0, 0, 0, 8)
    # Four of five copies of the 18 tokens are saved, and a beginning has a spare slot of its own.
    assert different.n_bytes - alike.n_bytes == (4 * 18 - 1) * each
    for slots in made:
        assert slots.cache.nbytes + 5 * VOCABULARY * 4 == slots.plan.n_bytes


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_source_of_several_rows_is_encoded_and_held_once(
    name: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made, encoded = model_of(name), held_by(monkeypatch), []
    encode = model.encode

    def note(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Any:
        encoded.extend([row[mask.bool()].tolist() for row, mask in zip(ids_BT, mask_BT)])
        return encode(ids_BT, mask_BT)

    monkeypatch.setattr(model, "encode", note)
    one, two, three = [5, 6, 7, 8], [9, 10], [11, 12, 13]
    texts = [one, two, one, one, three, two, one]
    how: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams, "eos_token_id": ended_early(model)}
    rows = decode_rows(model, texts, slots=4, **how)
    assert sorted(encoded) == sorted([one, two, three])
    (slots,) = made
    assert (slots.plan.slots, slots.plan.sources, slots.plan.source) == (4, 3, 4)
    assert slots.cache.nbytes + 4 * beams * VOCABULARY * 4 == slots.plan.n_bytes
    for text, row in zip(texts, rows):
        (alone,) = decode_rows(model, [text], **how)
        assert row.ids == alone.ids


def test_sources_that_come_often_are_encoded_once_with_fewer_places_than_sources_too() -> None:
    model, encoded = model_of("bart"), []
    with pytest.MonkeyPatch.context() as patch:
        encode = model.encode

        def note(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Any:
            encoded.append(len(ids_BT))
            return encode(ids_BT, mask_BT)

        patch.setattr(model, "encode", note)
        texts = [[5, 6, 7]] * 4 + [[8, 9]] * 4 + [[10]] * 4
        rows = decode_rows(model, texts, slots=2, max_new_tokens=4)
    assert sum(encoded) == 3
    for at in (0, 4, 8):
        (alone,) = decode_rows(model, texts[at : at + 1], max_new_tokens=4)
        assert [row.ids for row in rows[at : at + 4]] == [alone.ids] * 4


def test_more_samples_than_the_memory_holds_are_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("numbers were drawn")

    monkeypatch.setattr("lathe.generate.continuous.numbers", drawn)
    monkeypatch.setattr("lathe.generate.memory.free_bytes", lambda _: 1000)
    with pytest.raises(RequestError, match="a cache for 100 rows of 5 tokens does not fit into memory"):
        decode_rows(model_of("gpt2"), [[5, 6]], slots=100, max_new_tokens=4, do_sample=True, num_return_sequences=100)


def test_samples_of_a_source_read_it_once() -> None:
    model = model_of("t5")
    with Reads(model) as reads:
        rows = decode_rows(
            model, [[5, 6, 7]], slots=4, max_new_tokens=3, do_sample=True, num_return_sequences=4, seed=0
        )
    assert len(rows) == 4
    # The first sample's pass encodes, the others' reads what it left.
    assert reads.shapes[:2] == [(1, 1), (3, 1)]


def held_by(monkeypatch: pytest.MonkeyPatch) -> list[Slots]:
    """The places that are made from now on."""
    made: list[Slots] = []
    init = Slots.__init__

    def keep(self: Slots, *given: Any) -> None:
        init(self, *given)
        made.append(self)

    monkeypatch.setattr(Slots, "__init__", keep)
    return made


def test_several_samples_read_their_prompt_once() -> None:
    model, text = model_of("llama"), list(range(10, 25))
    with Reads(model) as reads:
        decode_rows(model, [text], slots=4, max_new_tokens=1, do_sample=True, num_return_sequences=4, seed=0)
    assert reads.shapes == [(1, 15), (3, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_as_large_as_planned_and_never_larger(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, held = model_of(name), held_by(monkeypatch), []
    plain = Slots.step

    def note(self: Slots, tokens: Any) -> Any:
        held.append(self.cache.nbytes)
        return plain(self, tokens)

    monkeypatch.setattr(Slots, "step", note)
    texts = [[5] * n for n in (3, 11, 6, 8, 2)]
    decode_rows(model, texts, slots=2, max_new_tokens=6, eos_token_id=None)
    (slots,) = made
    source = 0 if model.encoder is None else 11
    tokens = 6 if model.encoder is not None else 16
    assert (slots.plan.slots, slots.plan.tokens, slots.plan.source) == (2, tokens, source)
    logits = 2 * VOCABULARY * 4
    assert set(held) == {slots.plan.n_bytes - logits}
    assert slots.plan.n_bytes == decoding_bytes(model.architecture, 2, tokens, 2, source, model.dtype.itemsize)


def test_places_are_as_many_as_half_of_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = model_of("gpt2"), torch.device("cpu")
    each = decoding_bytes(model.architecture, 1, 30, 1, 0, 8)
    monkeypatch.setattr("lathe.generate.slots.free_bytes", lambda _: 7 * each)
    monkeypatch.setattr("lathe.generate.memory.free_bytes", lambda _: 7 * each)

    def planned(rows: int, slots: int | None) -> int:
        texts = [([number % 60], 30) for number in range(rows)]
        return plan_slots(model.architecture, texts, slots=slots, itemsize=8, device=device).slots

    assert (planned(100, None), planned(2, None), planned(100, 6)) == (3, 2, 6)
    with pytest.raises(RequestError, match="a cache for 8 rows of 30 tokens does not fit into memory"):
        planned(100, 8)
    monkeypatch.setattr("lathe.generate.memory.free_bytes", lambda _: each // 2)
    with pytest.raises(RequestError, match="a cache for 1 rows"):
        planned(100, 1)


def test_a_part_of_a_cache_is_the_same_memory() -> None:
    model = model_of("gpt2")
    cache = Cache(model.architecture, 3, 4, dtype=model.dtype)
    part = cache.part(1, torch.tensor([0, 0]), 0)
    model(input_ids=torch.tensor([[5, 6], [7, 8]]), past_key_values=part)
    k_BGSK, _ = cache.layers[0].read()
    assert (k_BGSK[0] == 0).all()
    assert (k_BGSK[1:, :, :2] != 0).all()
    assert part.lengths_B.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("texts", "how", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[5], []], {}, "prompt 2 has shape"),
        ([[5], [99]], {}, "token id 99"),
        ([[5]], {"num_beams": 2, "suppress_tokens": list(range(VOCABULARY))}, "leave row 0 no token"),
        ([[5]], {"num_beams": 2, "num_return_sequences": 3}, "expected at most num_beams=2"),
        ([[5]], {"slots": 0}, "slots=0: expected at least 1"),
        ([[6], [5] * 30], {"max_new_tokens": 9}, "prompt 2 has 30 tokens: .* more than this model's 32 positions"),
        ([[5], [6]], {"seed": (1,), "do_sample": True}, "1 seeds for 2 prompts"),
        ([[5], [6]], {"suppress_tokens": list(range(VOCABULARY))}, "leave row 0 no token"),
    ],
)
def test_what_cannot_be_is_refused(texts: list[list[int]], how: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_rows(model_of("gpt2"), texts, **how)


def test_a_source_that_is_too_long_is_refused_before_any_row_is_decoded() -> None:
    model = model_of("bart")
    assert model.architecture.encoder is not None
    most = model.architecture.encoder.positions.limit
    assert most is not None
    with pytest.raises(RequestError, match=f"prompt 3 has {most + 1} tokens, more than this model's {most} positions"):
        rows_as_finished(model, [[5], [6, 7], [8] * (most + 1)], slots=1, max_new_tokens=2)


def test_stop_strings_and_models_are_left_as_they_were() -> None:
    model = model_of("gpt2").train()
    rows = rows_as_finished(model, [[5, 6], [7]], max_new_tokens=3, eos_token_id=None)
    assert isinstance(next(rows), Row)
    assert isinstance(rows, Generator)
    rows.close()
    assert model.training
    model.eval()
    with pytest.raises(RequestError, match="stop_strings"):
        rows_as_finished(model, [[5]], stop_strings=["x"])
