"""The basis that is looked for: what it has to be, and when it has to be better than the principal one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import lathe
from lathe.architecture import Architecture, Norm
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.calibrate import moments
from lathe.reshape.fold import is_tied
from lathe.reshape.request import read_request
from lathe.reshape.search import STEPS, Found, Sought, search, steps_within, worth
from lathe.reshape.sensitivity import sensitivity
from lathe.reshape.width import Basis, is_centred, norms_of, principal
from tests.reshape.test_sensitivity import SHAPES, divergence
from tests.reshape.test_width import build, few, text, with_pre_norm
from tests.strategies import architectures

WIDER: dict[str, Any] = {"d_model": 24, "d_ff": 32, "vocab_size": 60}


def shape(name: str) -> Architecture:
    preset, more = SHAPES[name]
    return lathe.preset(preset).with_({"n_heads": 2, "n_layers": 2, **WIDER, **more})


def looked_for(model: Transformer, width: int, steps: int) -> tuple[Found, Basis]:
    """What is found, and the principal basis."""
    architecture, batches = model.architecture, [text(model.architecture, rows=64, seed=seed) for seed in range(3)]
    norms, centred = norms_of(architecture, "residual"), is_centred(architecture, "residual")
    seen = moments(model, batches, norms)
    felt = sensitivity(model, batches, seen.tokens, least_rows=10**6, generator=torch.Generator().manual_seed(0))
    sought = Sought(
        felt,
        {norm: model.get_submodule(norm).get_parameter("weight").detach() for norm in norms},
        shifted=frozenset(norm for norm in norms if getattr(model.get_submodule(norm), "bias", None) is not None),
        tied=frozenset(norm for norm in norms if is_tied(architecture, norm)),
    )
    assert all(cost >= 0 for cost in worth(sought, seen).values())
    start = principal(seen, norms, width, centred=centred)
    return search(start, sought, seen, steps), start


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_a_basis_that_loses_less(name: str) -> None:
    found, start = looked_for(build(shape(name)), 16, 30)
    assert 0 < found.after < 0.95 * found.before
    matrix = found.basis.matrix
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(16).double(), rtol=0, atol=1e-9)
    assert not torch.equal(matrix, start.matrix)
    if found.basis.centred:  # the mean stays the mean, and all else has none
        torch.testing.assert_close(matrix.sum(0), torch.full((16,), (24 / 16) ** 0.5).double())
        torch.testing.assert_close(matrix.sum(1), torch.full((24,), (16 / 24) ** 0.5).double())
    norms = list(found.basis.energy)
    assert sum(found.basis.energy.values()) < sum(start.energy.values())  # of which the principal one keeps most
    assert norms == list(start.energy)


@given(architectures(max_layers=2))
@settings(few, max_examples=10)
def test_it_is_never_worse_on_the_tokens_held_out(drawn: Architecture) -> None:
    model = build(with_pre_norm(drawn))
    found, _ = looked_for(model, max(model.architecture.d_model // 2, 2), 5)
    assert found.after <= found.before


def test_no_steps_change_nothing() -> None:
    found, start = looked_for(build(shape("llama")), 16, 0)
    assert found.basis is start
    assert found.before == found.after


def loud_but_unread() -> Transformer:
    """A model whose stream moves most in eight channels that no weight reads or writes.

    All tokens' vectors are equally long, in these channels and in the others, and the layers add little, so that
    nothing is told by how long a vector is.
    """
    model = build(shape("llama").with_({"tied": False}))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith((".q.weight", ".k.weight", ".v.weight", ".up.weight", ".gate.weight", "output.weight")):
                tensor[:, :8] = 0.0
            if name.endswith((".o.weight", ".down.weight")):
                tensor[:8] = 0.0
                tensor.mul_(0.2)
        table = model.embedding.tokens.weight
        table[:, :8] = 8.0 * table[:, :8].sign()
        table[:, 8:] /= table[:, 8:].norm(dim=1, keepdim=True) / 4.0
        model.get_submodule("decoder.norm").get_parameter("weight")[:8] = 0.0
    return model


def test_what_moves_most_goes_where_nobody_reads_it() -> None:
    model = loud_but_unread()
    batches, test = (
        [text(model.architecture, rows=64, seed=seed) for seed in range(3)],
        text(model.architecture, seed=9),
    )
    with torch.no_grad():
        wanted = model(**test).logits

    def lost(steps: int | None) -> float:
        done = resize(model, {"d_model": 16}, calibrate=batches, search=steps)
        with torch.no_grad():
            return divergence(wanted, done.model()(**test).logits)

    assert lost(None) < 0.2 * lost(0)


def test_the_step_says_how_the_basis_was_found() -> None:
    model, batch = build(shape("llama")), text(shape("llama"), rows=64)

    def first(**how: Any) -> str:
        return resize(model, {"d_model": 16}, calibrate=[batch], **how).steps[0].note

    assert first(search=7).startswith("the basis was looked for in 7 steps: its loss, to first order, is ")
    assert first().startswith("the basis was looked for in ")
    assert first(search=0) == ""
    assert first(refit=False) == ""  # the readers that it counts on are not fitted


def test_the_same_seed_finds_the_same_basis() -> None:
    model, batch = build(shape("t5")), text(shape("t5"), rows=32)

    def table(seed: int) -> Tensor:
        done = resize(model, {"d_model": 16}, calibrate=[batch], search=5, seed=seed)
        return done.tensors["embedding.tokens.weight"]

    assert torch.equal(table(0), table(0))
    assert not torch.equal(table(0), table(1))  # labels are drawn


def test_large_models_get_fewer_steps_and_then_none() -> None:
    assert steps_within(22 * 2500, 512, 384) == STEPS
    some = steps_within(122 * 3072, 1024, 768)
    assert 0 < some < STEPS
    assert steps_within(65 * 12288, 4096, 3072) == 0


@pytest.mark.parametrize("given", [-1, "many", 1.5])
def test_steps_that_cannot_be_are_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="search"):
        read_request("model", {"d_model": 16, "search": given})
    with pytest.raises(RequestError, match="search"):
        resize(build(shape("llama")), {"d_model": 16}, calibrate=[text(shape("llama"))], search=given)


def test_a_search_whose_readers_are_not_fitted_is_refused() -> None:
    model = build(shape("llama"))
    with pytest.raises(RequestError, match="search=20 with refit=False: the search counts on readers"):
        read_request("model", {"d_model": 16, "search": 20, "refit": False})
    with pytest.raises(RequestError, match="search=20 with refit=False: the search counts on readers"):
        resize(model, {"d_model": 16}, calibrate=[text(model.architecture)], search=20, refit=False)
    whole, ids = lathe.Model(shape("llama"), seed=0), text(model.architecture)["input_ids"]
    with pytest.raises(RequestError, match="search=20 with refit=False: the search counts on readers"):
        lathe.plan_budget(whole, calibrate=[ids], max_parameters=9000, search=20, refit=False)
    none = resize(model, {"d_model": 16}, calibrate=[text(model.architecture)], search=0, refit=False)
    assert none.steps[0].note == ""


@pytest.mark.parametrize("steps", [1, 5])
def test_a_few_steps_are_all_made(steps: int) -> None:
    found, _ = looked_for(build(shape("t5")), 16, steps)
    assert found.steps == steps
    assert found.after < found.before


def test_a_basis_that_was_not_found_is_not_called_found() -> None:
    _, start = looked_for(build(shape("llama")), 16, 0)
    assert Found(start, 0.5, 0.5, 3).note == (
        "the basis was looked for in 3 steps, and none lost less than the one that was started from: "
        "0.5000 nats a prediction"
    )
    assert Found(start, 0.0, 0.0, 0).note.startswith("no basis was looked for: ")


def test_without_time_the_norms_are_weighed_and_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(shape("llama")), text(shape("llama"), rows=64)
    monkeypatch.setattr("lathe.reshape.search._WORK", 1000)
    monkeypatch.setattr("lathe.reshape.cut.search", None)
    weighed = resize(model, {"d_model": 16}, calibrate=[batch])
    assert weighed.steps[0].note.startswith("no basis was looked for: that would take hours")
    plain = resize(model, {"d_model": 16}, calibrate=[batch], search=0)
    assert weighed.steps[0].detail != plain.steps[0].detail


@pytest.mark.parametrize("steps", [None, 20])
def test_text_of_which_nothing_can_be_held_out_is_not_called_searched(steps: int | None) -> None:
    model = build(shape("llama"))
    done = resize(model, {"d_model": 6}, calibrate=[text(model.architecture, rows=1, length=7)], search=steps)
    assert done.steps[0].note.startswith("no basis was looked for: a norm saw 7 tokens, and it takes 8")


def test_one_channel_without_a_mean_is_no_basis_to_look_for() -> None:
    model = build(shape("gpt2"))
    done = resize(model, {"d_model": 1}, calibrate=[text(model.architecture, rows=8)], search=3, own_form=True)
    assert done.architecture.d_model == 1
    assert done.steps[0].note.startswith("no basis was looked for")


def test_each_norm_has_a_bias_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, biased = (Norm(kind="layer", eps=1e-5, bias=bias) for bias in (False, True))
    mixed = shape("t5").with_({"encoder.norm": plain, "decoder.norm": biased})
    given: list[Sought] = []

    def looking(start: Basis, sought: Sought, *more: Any) -> Found:
        given.append(sought)
        return search(start, sought, *more)

    monkeypatch.setattr("lathe.reshape.cut.search", looking)
    resize(build(mixed), {"d_model": 16}, calibrate=[text(mixed, rows=64)], search=1, own_form=True)
    assert given[0].shifted == {name for name in given[0].scales if name.startswith("decoder.")}
    assert len(given[0].shifted) < len(given[0].scales)


def test_what_growth_draws_does_not_depend_on_the_search() -> None:
    model, batch = build(shape("gpt2")), text(shape("gpt2"), rows=64)

    def drawn(steps: int) -> Tensor:
        done = resize(model, {"d_model": 16, "d_ff": 48}, calibrate=[batch], search=steps)
        new = done.tensors["decoder.feed_forward.0.up.weight"][32:]
        return new / new.norm()  # as large as the neurons beside them, which another basis wrote

    torch.testing.assert_close(drawn(0), drawn(2))


@pytest.mark.parametrize("head", [None, "masked"])
def test_where_nothing_is_looked_for_it_says_so(head: str | None) -> None:
    bert = lathe.preset("bert-base-uncased", head=head).with_({"n_heads": 2, "n_layers": 2, "d_head": 12, **WIDER})
    model = build(bert)
    done = resize(model, {"d_model": 16}, calibrate=[text(bert, rows=64)], search=5)
    assert any(step.note.startswith("no basis was looked for") for step in done.steps)
    with pytest.raises(RequestError, match="search=5 with method=select"):
        resize(model, {"d_model": 16}, calibrate=[text(bert)], method="select", search=5)
