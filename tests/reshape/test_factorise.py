"""Factorised embeddings: exact at full rank and on low-rank tables, exact on the way back, measured in between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from lathe.architecture import Head, LanguageHead
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.factorise import split_head
from lathe.reshape.state import State
from tests.reshape.test_width import build, gpt_like, rebuilt, text
from tests.strategies import architectures

few = settings(max_examples=8, deadline=None)


def assert_same(new: Transformer, old: Transformer) -> None:
    batch = text(old.architecture, rows=3, length=6, seed=1)
    with torch.no_grad():
        ours, theirs = new(**batch), old(**batch)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-6, atol=1e-8)
    if theirs.logits is not None:
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-6, atol=1e-8)


def factorised(model: Transformer, width: int) -> Transformer:
    done = resize(model, {"d_embed": width}, calibrate=[text(model.architecture)])
    assert done.architecture.embedding.d_embed == width
    return rebuilt(State(done.architecture, done.tensors))


@given(architectures(max_layers=1, language=True))
@few
def test_full_rank_without_norms_in_between_is_exact(drawn):
    changes: dict[str, object] = {"d_embed": None, "vocab_size": 59, "head.language.transform": None}
    model = build(drawn.with_(changes | {f"{name}.input_norm": False for name, _ in drawn.stacks}))
    assert_same(factorised(model, drawn.d_model), model)


@given(architectures(max_layers=1, shapes=("encoder", "decoder"), language=False))
@few
def test_full_rank_takes_a_norm_on_the_embeddings_in(drawn):
    name, _ = next(drawn.stacks)
    model = build(drawn.with_({"d_embed": None, "vocab_size": 59, f"{name}.input_norm": True}))
    assert_same(factorised(model, drawn.d_model), model)


@given(architectures(max_layers=1))
@few
def test_the_way_back_is_exact(drawn):
    changes: dict[str, object] = {"d_embed": 5}
    if drawn.head.language is not None:
        changes |= {"head.language.tied": False, "head.language.transform": None}
    model = build(drawn.with_(changes | {f"{name}.input_norm": False for name, _ in drawn.stacks}))
    done = resize(model, {"d_embed": None})
    assert [step.exact for step in done.steps] == [True]
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


def test_a_tied_head_is_untied_on_the_way_back():
    model = build(gpt_like(d_embed=8))
    done = resize(model, {"d_embed": None, "tied": False})
    assert all(step.exact for step in done.steps)
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_low_rank_loses_nothing(tied):
    model = build(gpt_like(tied=tied))
    onto = torch.linalg.qr(torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    tables = ["embedding.tokens.weight", "decoder.input.positions.weight"]
    with torch.no_grad():
        for name in tables if tied else [*tables, "head.language.output.weight"]:
            model.get_parameter(name).copy_(model.get_parameter(name) @ onto @ onto.T)
    done = resize(model, {"d_embed": 6}, calibrate=[text(gpt_like())])
    assert done.steps[0].detail["energy"] == pytest.approx(1.0)
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


def test_more_rank_loses_less_and_frequent_tokens_least():
    model, batch = build(gpt_like(tied=False)), text(gpt_like())
    batch["input_ids"] = batch["input_ids"] % 6  # six tokens and twelve positions are all that the text has
    errors = []
    for width in (4, 8, 16):
        done = resize(model, {"d_embed": width}, calibrate=[batch])
        small = rebuilt(State(done.architecture, done.tensors))
        assert not done.steps[0].exact
        with torch.no_grad():
            errors.append(float((small(**batch).logits - model(**batch).logits).norm()))
    assert errors[0] > errors[1] > errors[2]
    full = factorised_on(model, batch, 18)  # the rank of what the text shows
    hidden, before = (m(**batch).last_hidden_state for m in (full, model))
    torch.testing.assert_close(hidden, before, rtol=1e-6, atol=1e-8)


def factorised_on(model: Transformer, batch: dict[str, torch.Tensor], width: int) -> Transformer:
    done = resize(model, {"d_embed": width}, calibrate=[batch])
    return rebuilt(State(done.architecture, done.tensors))


def test_a_masked_head_is_fitted_again():
    head = Head(language=LanguageHead(transform="gelu", bias=True))
    architecture = gpt_like(norm_position="post", head=head).with_({"decoder.input_norm": True})
    model, batch = build(architecture), text(architecture, rows=40)
    small = factorised(model, 24)
    with torch.no_grad():
        ours, theirs = small(**batch).logits, model(**batch).logits
    explained = 1 - float((ours - theirs).square().sum() / (theirs - theirs.mean()).square().sum())
    assert explained > 0.3


def test_the_heads_factors_are_the_best_for_what_it_reads():
    generator = torch.Generator().manual_seed(0)
    table, inputs = (torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (40, 200))
    inputs = inputs * torch.arange(10).double()
    narrow, onto = split_head(table, inputs.T @ inputs, 4)
    error = (inputs @ (table - narrow @ onto).T).norm()
    best = torch.linalg.svdvals(inputs @ table.T)[4:].norm()  # Eckart and Young's bound
    assert float(error) == pytest.approx(float(best), rel=1e-9)


def test_a_factor_counts_what_the_paper_counts():
    wide = gpt_like(d_model=1024, vocab_size=10_000, d_head=512)
    sizes = {}
    for name, width in (("wide", None), ("narrow", 512)):
        architecture = wide.with_(d_embed=width)
        sizes[name] = sum(p.size for p in stored(architecture) if p.name.startswith("embedding."))
    assert sizes == {"wide": 10_240_000, "narrow": 5_644_288}


def test_bad_requests_are_one_line():
    normed = gpt_like(d_embed=8).with_({"decoder.input_norm": True})
    for architecture, changes, message in (
        (gpt_like(), {"d_embed": 40}, "wider than d_model=32"),
        (gpt_like(vocab_size=20), {"d_embed": 30}, "more than the 20 tokens have"),
        (gpt_like(d_embed=8), {"d_embed": None}, "add tied=false"),
        (normed, {"d_embed": None}, "a norm stands between"),
        (gpt_like(d_embed=8), {"d_embed": 9}, "d_embed=9: this model has 8, and it can only be cut"),
        (gpt_like(), {"d_embed": 8, "embedding.projection_bias": True}, "cannot change embedding.projection_bias"),
    ):
        with pytest.raises(RequestError) as raised:
            resize(build(architecture), changes, calibrate=[text(architecture)])
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
