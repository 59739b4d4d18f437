"""In float32, for the seven families and for what no family has: unchanged sizes and growth change nothing.

The random architectures of the other tests are computed in float64, where a mistake cannot hide behind rounding. What a
user has is float32, and the bound there is 1e-5 of the outputs' size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import lathe
from lathe.architecture import Architecture
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.calibrate import moments
from lathe.reshape.factorise import factorise
from lathe.reshape.heads import narrow_heads
from lathe.reshape.prune import merge_keys, prune_feed_forward, prune_heads
from lathe.reshape.prune_layers import prune_layers
from lathe.reshape.refit import refit
from lathe.reshape.share import share
from lathe.reshape.state import State
from lathe.reshape.vocabulary import Vocabulary
from lathe.reshape.width import is_centred, keep, norms_of, principal, rotate, streams_of
from tests.reshape.test_width import build, text
from tests.strategies import architectures

BOUND = 1e-5
SIZES: dict[str, Any] = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_head": 12, "d_ff": 40, "vocab_size": 50}
FAMILIES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "t5": ("t5-small", None, {}),
    "bert": ("bert-base-uncased", "masked", {"max_positions": 32}),
    "electra": ("electra-small", "masked", {"max_positions": 32, "d_embed": 12}),
    "albert": ("albert-base", "masked", {"max_positions": 32, "d_embed": 12}),
    "bart": ("bart-base", None, {"max_positions": 32}),
    "gpt2": ("gpt2", None, {"max_positions": 32}),
    "llama": ("llama-2-7b", None, {"max_positions": 32, "n_kv_heads": 2}),
}


def parent(name: str) -> Transformer:
    preset, head, more = FAMILIES[name]
    return build(lathe.preset(preset, head=head).with_(SIZES | more)).float()


def cast(state: State) -> Transformer:
    plain = state.cast(torch.float32)
    model = Transformer(plain.architecture, device="meta")
    model.load_state_dict(dict(plain.tensors), assign=True)
    return model.eval()


def assert_same(new: Transformer, old: Transformer) -> None:
    batch = text(old.architecture, rows=3, length=8, seed=1)
    with torch.no_grad():
        ours, theirs = new(**batch), old(**batch)
    name = "last_hidden_state" if theirs.logits is None else "logits"
    wanted = theirs[name].double()
    away = (ours[name].double()[..., : wanted.shape[-1]] - wanted).norm() / wanted.norm()
    assert away < BOUND


Unchanged = Callable[[Transformer, State, dict[str, torch.Tensor]], tuple[State, bool]]


def by_stack(act: Callable[..., Any]) -> Unchanged:
    """An operation on each stack."""

    def run(model: Transformer, state: State, batch: dict[str, torch.Tensor]) -> tuple[State, bool]:
        exact = True
        for name, stack in model.architecture.stacks:
            state, step = act(model, [batch], state, name, stack)
            exact &= step.exact
        return state, exact

    return run


def heads(model: Transformer, batches: Any, state: State, name: str, stack: Any) -> Any:
    if stack.positions.kind == "rotary":  # whose heads have a width that is fixed
        return merge_keys(state, name, stack.attention.kv_heads)
    return narrow_heads(state, name, stack.attention.d_head)


def rotation(model: Transformer, state: State, batch: dict[str, torch.Tensor]) -> tuple[State, bool]:
    norms, centred = norms_of(state.architecture, "residual"), is_centred(state.architecture, "residual")
    seen = moments(model, [batch], norms, streams=streams_of(state.architecture, "residual"))
    basis = principal(seen, norms, state.architecture.d_model, centred=centred)
    state, step = rotate(state, "residual", "d_model", basis, seen)
    return state, step.exact


def channels(model: Transformer, state: State, batch: dict[str, torch.Tensor]) -> tuple[State, bool]:
    state, step = keep(state, "residual", "d_model", torch.arange(state.architecture.d_model), "select")
    return state, step.exact


def fits(model: Transformer, state: State, batch: dict[str, torch.Tensor]) -> tuple[State, bool]:
    fitted, steps = refit(state, state, torch.eye(state.architecture.d_model, dtype=torch.float64), [batch])
    return fitted, steps[-1].exact


def tokens(model: Transformer, state: State, batch: dict[str, torch.Tensor]) -> tuple[State, bool]:
    every = Vocabulary(ids=range(state.architecture.embedding.vocab_size))
    done = resize(model, {}, vocabulary=every)
    return State(done.architecture, done.tensors), all(step.exact for step in done.steps)


UNCHANGED: dict[str, Unchanged] = {
    "feed-forward": by_stack(
        lambda model, batches, state, name, stack: prune_feed_forward(
            model, batches, state, name, stack.feed_forward.d_ff
        )
    ),
    "heads": by_stack(
        lambda model, batches, state, name, stack: prune_heads(
            model, batches, state, name, stack.attention.n_heads, stack.attention.kv_heads
        )
    ),
    "layers": by_stack(
        lambda model, batches, state, name, stack: prune_layers(model, batches, state, name, stack.n_layers)
    ),
    "sharing": by_stack(lambda model, batches, state, name, stack: share(state, name, str(stack.sharing))),
    "the width of heads": by_stack(heads),
    "rotation": rotation,
    "channels": channels,
    "refit": fits,
    "vocabulary": tokens,
}

GROWTH: dict[str, dict[str, Any]] = {
    "d_ff": {"d_ff": 56},
    "n_heads": {"n_heads": 4, "d_head": 12},
    "d_head": {"d_head": 16},
    "n_layers": {"n_layers": 4},
    "d_model": {"d_model": 48},
    "any d_model": {"d_model": 37},
    "tied": {"tied": False},
    "sharing": {"sharing": "none"},
    "rows": {"vocabulary": Vocabulary(multiple_of=64)},
}
# What the mathematics refuses: layers and odd widths where norms stand on the stream, wider rotary heads, untying or
# unsharing what is not tied or shared.
NOT_FOR: dict[str, set[str]] = {
    "n_layers": {"bert", "electra", "albert", "bart"},
    "any d_model": {"bert", "electra", "albert", "bart"},
    "d_head": {"llama"},
    "tied": {"llama"},
    "sharing": {"t5", "bert", "electra", "bart", "gpt2", "llama"},
}


@pytest.mark.parametrize("operation", UNCHANGED)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_unchanged_size_changes_nothing(name: str, operation: str):
    model = parent(name)
    state, exact = UNCHANGED[operation](
        model, State(model.architecture, model.state_dict()), text(model.architecture, rows=16)
    )
    assert exact
    assert_same(cast(state), model)


@pytest.mark.parametrize(("name", "growth"), [(n, g) for g in GROWTH for n in FAMILIES if n not in NOT_FOR.get(g, ())])
def test_growth_changes_nothing(name: str, growth: str):
    model, changes = parent(name), dict(GROWTH[growth])
    asked = changes.pop("vocabulary", None)
    done = resize(model, changes, own_form=True, vocabulary=asked)
    assert done.steps
    assert all(step.exact for step in done.steps)
    assert_same(cast(State(done.architecture, done.tensors)), model)


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_a_table_factorised_at_full_rank_changes_nothing(name: str):
    model = build(parent(name).architecture.with_({"vocab_size": 59})).float()
    done = resize(model, {"d_embed": 24}, calibrate=[text(model.architecture, rows=16)])
    assert done.architecture.embedding.d_embed == 24
    assert all(step.exact for step in done.steps)
    assert_same(cast(State(done.architecture, done.tensors)), model)
    state, _ = factorise(model, [text(model.architecture, rows=16)], State(model.architecture, model.state_dict()), 24)
    assert_same(cast(state), model)


@given(architectures(max_layers=2))
@settings(max_examples=10, deadline=None)
def test_what_no_family_has_stays_too(drawn: Architecture):
    model = build(drawn).float()
    state, batch = State(drawn, model.state_dict()), text(drawn, rows=16)
    for operation in ("feed-forward", "heads", "sharing", "the width of heads", "channels"):
        state, exact = UNCHANGED[operation](model, state, batch)
        assert exact
    assert_same(cast(state), model)
    changes: dict[str, Any] = {"sharing": "none"}
    for name, stack in drawn.stacks:
        changes[f"{name}.feed_forward.d_ff"] = stack.feed_forward.d_ff + 5
    done = resize(model, changes, own_form=True)
    assert all(step.exact for step in done.steps)
    assert_same(cast(State(done.architecture, done.tensors)), model)
