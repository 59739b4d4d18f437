"""Sharing: exact where layers differ by the order of their parts alone, and on every way back; measured elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.architecture import Sharing
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.align import align_attention, align_feed_forward, assignment
from lathe.reshape.operation import Context
from lathe.reshape.share import plan_sharing, refit_shared, share
from lathe.reshape.state import State
from tests.reshape.test_width import build, rebuilt, text
from tests.strategies import architectures

few = settings(max_examples=12, deadline=None)


def outputs(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(**text(model.architecture, rows=3, length=6, seed=1)).last_hidden_state


def state_of(model: Transformer) -> State:
    return State(model.architecture, model.state_dict())


def shared_all(model: Transformer, sharing: str, method: str = "mean") -> tuple[Transformer, list[bool]]:
    state, exact = state_of(model), []
    for name, _ in model.architecture.stacks:
        state, step = share(state, name, sharing, method)
        exact.append(step.exact)
    return rebuilt(state), exact


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_the_assignment_is_the_best_of_all(size):
    for seed in range(4):
        score = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        best = max(sum(float(score[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(size)))
        chosen = assignment(score)
        assert sorted(chosen.tolist()) == list(range(size))
        assert float(score[torch.arange(size), chosen].sum()) == pytest.approx(best)


@given(architectures())
@few
def test_unsharing_is_exact(drawn):
    model = build(drawn)
    copied, exact = shared_all(model, "none")
    assert all(exact)
    assert all(stack.sharing == Sharing() for _, stack in copied.architecture.stacks)
    torch.testing.assert_close(outputs(copied), outputs(model), rtol=1e-9, atol=1e-9)


@given(architectures(), st.sampled_from(["all", "attention", "feed_forward"]), st.sampled_from(["mean", "middle"]))
@few
def test_equal_layers_share_without_a_change(drawn, sharing, method):
    model, _ = shared_all(build(drawn.with_(sharing="all")), "none")
    together, exact = shared_all(model, sharing, method)
    assert all(exact)
    torch.testing.assert_close(outputs(together), outputs(model), rtol=1e-6, atol=1e-8)


@given(architectures(shapes=("encoder", "decoder")), st.integers(0, 99))
@few
def test_layers_that_differ_by_their_order_alone_share_without_a_change(drawn, seed):
    """Permuted heads and neurons compute the same, and aligned means find that out."""
    name, stack = next(drawn.stacks)
    model, _ = shared_all(build(drawn.with_({"sharing": "all", f"{name}.n_layers": 2})), "none")
    generator, spec = torch.Generator().manual_seed(seed), stack.attention
    with torch.no_grad():
        order = torch.randperm(stack.feed_forward.d_ff, generator=generator)
        groups = torch.randperm(spec.kv_heads, generator=generator)
        if stack.positions.kind == "relative":  # one table names the heads of every layer
            groups = torch.arange(spec.kv_heads)
        width, per_group = spec.d_head, spec.n_heads // spec.kv_heads
        keys = (groups[:, None] * width + torch.arange(width)).flatten()
        queries = (groups[:, None] * width * per_group + torch.arange(width * per_group)).flatten()
        for path, orders in ((f"{name}.attention.1", {"q": queries, "k": keys, "v": keys, "o": queries}),):
            permute(model, path, orders)
        permute(model, f"{name}.feed_forward.1", {"up": order, "gate": order, "down": order})
    together, exact = shared_all(model, "all")
    assert all(exact)
    torch.testing.assert_close(outputs(together), outputs(model), rtol=1e-5, atol=1e-7)


def permute(model: Transformer, path: str, orders: dict[str, torch.Tensor]) -> None:
    for leaf, order in orders.items():
        linear = getattr(model.get_submodule(path), leaf, None)
        if linear is None:
            continue
        if leaf in ("o", "down"):
            linear.weight.copy_(linear.weight[:, order].clone())
            continue
        linear.weight.copy_(linear.weight[order].clone())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order].clone())


@given(architectures(shapes=("encoder", "decoder")))
@few
def test_alignment_changes_no_layer(drawn):
    name, stack = next(drawn.stacks)
    model = build(drawn.with_({"sharing": "none", f"{name}.n_layers": 2}))
    state = state_of(model)
    changed: dict[str, torch.Tensor] = {}
    for kind in ("attention", "feed_forward"):
        first, second = (
            {n.removeprefix(f"{name}.{kind}.{i}."): t for n, t in state.tensors.items() if f"{name}.{kind}.{i}." in n}
            for i in range(2)
        )
        attention = kind == "attention"
        new = align_attention(first, second, stack) if attention else align_feed_forward(first, second)
        changed |= {f"{name}.{kind}.1.{leaf}": tensor for leaf, tensor in new.items()}
    torch.testing.assert_close(outputs(rebuilt(state.with_(changed))), outputs(model), rtol=1e-7, atol=1e-9)


@given(architectures(), st.sampled_from(["mean", "middle"]))
@few
def test_a_pattern_can_follow_any_other(drawn, method):
    model = build(drawn.with_({f"{name}.n_layers": 4 for name, _ in drawn.stacks}, sharing="none"))
    together, exact = shared_all(model, "cycle:2", method)
    assert all(stack.n_attentions == stack.n_feed_forwards == 2 for _, stack in together.architecture.stacks)
    assert outputs(together).isfinite().all()
    assert not all(exact) or torch.allclose(outputs(together), outputs(model), rtol=1e-5)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("method", ["mean", "middle"])
def test_the_refit_brings_the_shared_stack_nearer_to_its_parent(norm_position, method):
    drawn = small(norm_position)
    model = build(drawn)
    state, name = state_of(model), "decoder"
    shared, step = share(state, name, "all", method)
    assert not step.exact
    fitted, refit = refit_shared(model, [text(drawn, rows=32)], state, shared, name)
    assert not refit.exact
    away = [float((outputs(rebuilt(each)) - outputs(model)).square().mean()) for each in (shared, fitted)]
    assert away[1] < away[0]


@pytest.mark.parametrize(("rows", "length", "helps"), [(64, 12, True), (2, 3, False)])
def test_a_refit_stays_only_where_it_helps_on_unseen_text(rows, length, helps):
    drawn = small("pre")
    model = build(drawn)
    context = Context(model, state_of(model), [text(drawn, rows=rows, length=length)])
    (operation,) = plan_sharing(drawn, drawn.with_(sharing="all"), "mean")
    after, (_, refit) = operation.run(context, context.start)
    assert (refit.detail["after"] < refit.detail["before"]) == helps
    assert ("no refit" in refit.name) != helps
    unfitted, _ = share(context.start, "decoder", "all")
    same = all(torch.equal(after.wide(name), unfitted.wide(name)) for name in unfitted.tensors)
    assert same != helps


def small(norm_position: str):
    from lathe.presets import preset

    sizes = {"d_model": 16, "n_layers": 4, "n_heads": 2, "d_head": 8, "d_ff": 24, "vocab_size": 50}
    changes = {"norm_position": norm_position, "decoder.final_norm": norm_position == "pre"}
    return preset("gpt2").with_({**sizes, **changes, "max_positions": 24})


def test_bad_requests_are_refused():
    a = small("pre")
    with pytest.raises(RequestError, match="expected one of mean, middle"):
        plan_sharing(a, a.with_(sharing="all"), "best")
    with pytest.raises(RequestError, match="cannot be split"):
        a.with_(sharing="cycle:3")
