"""Cached logits against the uncached forward, over architectures that no family has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lathe
from lathe.architecture import Architecture
from lathe.errors import LatheError, RequestError
from lathe.generate.memory import decoding_bytes
from lathe.generate.prompt import Prompt
from lathe.generate.rows import Rows
from lathe.model.transformer import Transformer
from tests.generate.models import random_model
from tests.strategies import architectures

STEPS, SOURCE = 3, 5

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def ids(architecture: Architecture, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, architecture.embedding.vocab_size, (length,), generator=generator)


def ragged(tokens: list[Tensor], left: bool) -> Prompt:
    """Rows of different lengths as one prompt."""
    longest = max(map(len, tokens))
    ids_BT, mask_BT = torch.zeros(2, len(tokens), longest, dtype=torch.long)
    for row, each in enumerate(tokens):
        where = slice(longest - len(each), longest) if left else slice(0, len(each))
        ids_BT[row, where], mask_BT[row, where] = each, 1
    return Prompt(ids_BT, mask_BT)


def uncached(model: Transformer, tokens: Tensor, source: Tensor | None) -> Tensor:
    """The next token's logits after one row alone, without pads or cache."""
    if source is None:
        logits = model(tokens[None]).logits
    else:
        logits = model(source[None], decoder_input_ids=tokens[None]).logits
    return logits[0, -1].float()


@given(architectures(shapes=("decoder", "both"), language=True, max_layers=3), lengths, st.booleans())
@settings(max_examples=25)
def test_every_step_through_the_cache_is_the_uncached_forward(
    architecture: Architecture, lengths: list[int], left: bool
) -> None:
    """Ragged rows, grouped heads, rotary and relative positions, windows, cross-attention, shared layers."""
    # A pooler may need what no prompt of this test has, and generation never reads it.
    architecture = architecture.with_({"head.classifier": None, "head.pooler": None})
    model = random_model(architecture)
    rows_of_ids = [ids(architecture, n + STEPS, seed) for seed, n in enumerate(lengths)]
    sources: list[Tensor | None] = [None] * len(lengths)
    memory = None
    if architecture.encoder is not None:
        # Padded on the right, so that learned positions are the same as without pads.
        sources = [ids(architecture, 1 + (n + 2) % SOURCE, 99 + seed) for seed, n in enumerate(lengths)]
        whole = ragged([each for each in sources if each is not None], left=False)
        memory = model.encode(whole.ids_BT, whole.mask_BT)
    with torch.no_grad():
        prompt = ragged([row[:n] for row, n in zip(rows_of_ids, lengths)], left)
        rows = Rows(model, prompt, STEPS + 1, memory)
        logits_BV = rows.prefill()
        for step in range(STEPS + 1):
            for row, (tokens, n) in enumerate(zip(rows_of_ids, lengths)):
                expected = uncached(model, tokens[: n + step], sources[row])
                torch.testing.assert_close(logits_BV[row], expected, rtol=1e-5, atol=1e-5)
            if step < STEPS:
                logits_BV = rows.step(torch.stack([r[n + step] for r, n in zip(rows_of_ids, lengths)]))


@given(architectures(shapes=("decoder", "both"), language=True, max_layers=2))
@settings(max_examples=6)
def test_reordered_rows_go_on_as_copies(architecture: Architecture) -> None:
    model = random_model(architecture)
    prompt = ragged([ids(architecture, 3, 1), ids(architecture, 2, 2)], left=True)
    memory = None
    if architecture.encoder is not None:
        source = ragged([ids(architecture, 4, 3), ids(architecture, 2, 4)], left=False)
        memory = model.encode(source.ids_BT, source.mask_BT)
    order, new = torch.tensor([1, 0, 1]), torch.tensor([5, 6])
    with torch.no_grad():
        straight, turned = Rows(model, prompt, 3, memory), Rows(model, prompt, 3, memory)
        first = straight.prefill()
        assert torch.equal(first, turned.prefill())
        turned.reorder(order)
        expected, given_ = straight.step(new)[order], turned.step(new[order])
    torch.testing.assert_close(given_, expected)


def test_weights_that_give_no_numbers_are_an_error_and_no_text() -> None:
    model = lathe.Model(lathe.preset("gpt2").with_(d_model=8, d_ff=8, n_layers=1, n_heads=2, d_head=4, vocab_size=300))
    with torch.no_grad():
        model.get_parameter("decoder.norm.bias")[0] = torch.nan
    with pytest.raises(RequestError, match=r"the weight decoder\.norm\.bias holds 1 values of 8 that are NaN"):
        model.generate(torch.tensor([[5, 6]]))
    with pytest.raises(RequestError, match=r"the weight decoder\.norm\.bias"):
        model.generate(torch.tensor([[5, 6]]), num_beams=2)


def test_a_type_too_narrow_for_the_logits_is_named_as_such() -> None:
    model = lathe.Model(lathe.preset("gpt2").with_(d_model=8, d_ff=8, n_layers=1, n_heads=2, d_head=4, vocab_size=300))
    with torch.no_grad():
        model.get_parameter("decoder.norm.weight").fill_(3e38)
    with pytest.raises(LatheError, match=r"torch.float32 is too narrow"):
        model.generate(torch.tensor([[5, 6]]))


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_taken() -> None:
    wide = {"d_model": 8, "d_ff": 8, "n_layers": 1, "n_heads": 16, "n_kv_heads": 16, "d_head": 4096, "vocab_size": 99}
    model = lathe.Model(lathe.preset("llama-2-7b").with_(wide))
    with pytest.raises(
        RequestError, match=r"1 rows of 1,073,741,825 tokens does not fit into memory: it needs 512 TiB"
    ):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2**30)
    with pytest.raises(RequestError, match=r"40 rows of 16,777,217 tokens does not fit .* fewer beams"):
        model.generate(torch.tensor([[5, 6]] * 10), max_new_tokens=2**24, num_beams=4)


@pytest.mark.parametrize("preset", ["gpt2", "t5-small"])
def test_the_bytes_that_are_said_are_those_that_are_held(preset: str) -> None:
    small = {"d_model": 8, "d_ff": 8, "n_layers": 2, "n_heads": 2, "d_head": 4, "vocab_size": 99}
    model = lathe.Model(lathe.preset(preset).with_({**small, "tokens.eos": [], "tokens.bos": None}))
    memory = None if model.encoder is None else model.encode(torch.full((2, 5), 7))
    rows = Rows(model, ragged([torch.tensor([5, 6, 7]), torch.tensor([5])], left=True), 4, memory, copies=3)
    logits_BV = rows.prefill()
    rows.spread(3)
    source = 0 if memory is None else 5
    logit_bytes = 3 * logits_BV.numel() * 4
    assert rows.cache.nbytes + logit_bytes == decoding_bytes(model.architecture, 6, 6, 2, source, 4)


@given(architectures(shapes=("decoder", "both"), language=True, max_layers=2))
@settings(max_examples=5)
def test_beams_that_change_places_are_copies_which_share_the_encoders_output(architecture: Architecture) -> None:
    model = random_model(architecture.with_({"head.classifier": None, "head.pooler": None}))
    prompt = ragged([ids(architecture, 3, 1), ids(architecture, 2, 2)], left=True)
    memory = None
    if architecture.encoder is not None:
        source = ragged([ids(architecture, 4, 3), ids(architecture, 2, 4)], left=False)
        memory = model.encode(source.ids_BT, source.mask_BT)
    places, new = torch.tensor([1, 1, 0, 3, 5, 4]), torch.tensor([5, 6, 4, 6, 5, 4])
    straight, turned = Rows(model, prompt, 3, memory), Rows(model, prompt, 3, memory)
    straight.prefill(), turned.prefill()
    straight.reorder(torch.tensor([0, 0, 0, 1, 1, 1]))
    turned.spread(3)
    torch.testing.assert_close(turned.step(new), straight.step(new))
    straight.reorder(places)
    turned.swap(places)
    torch.testing.assert_close(turned.step(new[places]), straight.step(new[places]))
    for layer in turned.cache.memory:
        assert layer.k is not None
        assert len(layer.k) == 2
