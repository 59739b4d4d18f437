"""Pruning of random architectures: exact where nothing is lost, measured and labelled where something is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.grow import deepen
from lathe.reshape.prune import Activity, activities, prune_feed_forward, prune_heads, refit
from lathe.reshape.prune_layers import layer_importance, prune_layers
from lathe.reshape.state import State
from tests.reshape.test_width import build, gpt_like, rebuilt, text
from tests.strategies import architectures

few = settings(max_examples=10, deadline=None)


def states(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(**text(model.architecture, rows=4, length=8, seed=1)).last_hidden_state


@given(architectures(max_layers=2))
@few
def test_pruning_to_the_same_size_is_exact(drawn):
    model, batches = build(drawn), [text(drawn)]
    state = State(drawn, model.state_dict())
    for name, stack in drawn.stacks:
        a = stack.attention
        state, first = prune_feed_forward(model, batches, state, name, stack.feed_forward.d_ff)
        state, second = prune_heads(model, batches, state, name, a.n_heads, a.kv_heads)
        state, third = prune_layers(model, batches, state, name, stack.n_layers)
        assert first.exact
        assert second.exact
        assert third.exact
    torch.testing.assert_close(states(rebuilt(state)), states(model), rtol=0, atol=0)


def silence(model: Transformer, group: str, dead: list[int], unit: int = 1) -> None:
    """Let some neurons or heads put out nothing: the rows that make them are zero."""
    with torch.no_grad():
        for parameter, dim in State(model.architecture, {}).along(group):
            if parameter.role == "reader" and parameter.name.split(".")[-2] not in ("q", "k"):
                rows = model.get_parameter(parameter.name).movedim(dim, 0).unflatten(0, (-1, unit))
                rows[dead] = 0.0


@given(architectures(max_layers=2), st.data())
@few
def test_neurons_that_put_out_nothing_go_first(drawn, data):
    model = build(drawn)
    sizes = {}
    for name, stack in drawn.stacks:
        d_ff = stack.feed_forward.d_ff
        gone = data.draw(st.integers(1, d_ff - 1))
        sizes[f"{name}.feed_forward.d_ff"] = d_ff - gone
        for index in range(stack.n_feed_forwards):
            dead = data.draw(st.permutations(range(d_ff)))[:gone]
            silence(model, f"{name}.feed_forward.{index}.ffn", dead)
    done = resize(model, sizes, calibrate=[text(drawn)])
    assert not any(step.exact for step in done.steps)
    assert all(value == pytest.approx(1.0, abs=1e-6) for step in done.steps for value in step.detail.values())
    small = rebuilt(State(done.architecture, done.tensors))
    torch.testing.assert_close(states(small), states(model), rtol=1e-6, atol=1e-8)


@given(architectures(max_layers=2), st.data())
@few
def test_heads_that_put_out_nothing_go_first(drawn, data):
    # Whole groups die here; where queries and keys come in equal numbers those are single heads.
    model = build(drawn)
    sizes: dict[str, object] = {}
    for name, stack in drawn.stacks:
        a = stack.attention
        gone = data.draw(st.integers(0, a.kv_heads - 1))
        sizes[f"{name}.attention.n_heads"] = (a.kv_heads - gone) * (a.n_heads // a.kv_heads)
        sizes[f"{name}.attention.n_kv_heads"] = a.kv_heads - gone
        dead = data.draw(st.permutations(range(a.kv_heads)))[:gone]  # the same in all layers, for a relative bias' sake
        for kind in ("attention", "cross_attention") if stack.cross_attention else ("attention",):
            for index in range(stack.n_attentions):
                keys = "heads" if a.kv_heads == a.n_heads else "kv_heads"
                silence(model, f"{name}.{kind}.{index}.{keys}", dead, a.d_head)
    done = resize(model, sizes, calibrate=[text(drawn, rows=32)])
    small = rebuilt(State(done.architecture, done.tensors))
    torch.testing.assert_close(states(small), states(model), rtol=1e-6, atol=1e-8)


def test_query_heads_are_ranked_within_their_group():
    architecture = gpt_like(n_heads=6, n_kv_heads=2, family=None)
    model = build(architecture)
    with torch.no_grad():
        for layer in range(2):
            model.get_parameter(f"decoder.attention.{layer}.v.weight")[:8] *= 50.0  # the first group is louder
    done = resize(model, {"n_heads": 4}, calibrate=[text(architecture)])
    a = dict(done.architecture.stacks)["decoder"].attention
    assert (a.n_heads, a.kv_heads) == (4, 2)
    old, new = model.get_parameter("decoder.attention.0.k.weight"), done.tensors["decoder.attention.0.k.weight"]
    assert torch.equal(old.detach(), new)  # both groups are still there, whole
    rows = done.tensors["decoder.attention.0.q.weight"].unflatten(0, (4, 8))
    before = model.get_parameter("decoder.attention.0.q.weight").detach().unflatten(0, (6, 8))
    where = [next(h for h in range(6) if torch.equal(before[h], row)) for row in rows]
    assert [head // 3 for head in where] == [0, 0, 1, 1]


def test_fewer_heads_go_on_filling_the_width_unless_their_width_is_given():
    model, batch = build(gpt_like(d_head=16)), text(gpt_like())
    filling = resize(model, {"n_heads": 1}, calibrate=[batch])
    assert [step.exact for step in filling.steps] == [False, True]
    assert dict(filling.architecture.stacks)["decoder"].attention.d_head == 32
    narrow = resize(model, {"n_heads": 1, "d_head": 16}, calibrate=[batch])
    assert dict(narrow.architecture.stacks)["decoder"].attention.d_head == 16


def test_equal_key_value_heads_are_merged_without_loss():
    single = gpt_like(n_heads=6, n_kv_heads=2, family=None)
    model = build(single)
    apart = resize(model, {"n_kv_heads": 6})  # three copies of each
    many = rebuilt(State(apart.architecture, apart.tensors))
    done = resize(many, {"n_kv_heads": 2})
    assert not done.steps[0].exact
    torch.testing.assert_close(states(rebuilt(State(done.architecture, done.tensors))), states(model))
    fewer = resize(many, {"n_heads": 4, "n_kv_heads": 2}, calibrate=[text(single)])
    assert [step.name.split()[0] for step in fewer.steps] == ["merge", "prune"]
    more = resize(many, {"n_heads": 8, "n_kv_heads": 2})
    assert [step.name.split()[0] for step in more.steps] == ["merge", "add"]
    torch.testing.assert_close(states(rebuilt(State(more.architecture, more.tensors))), states(model))


@given(architectures(max_layers=3), st.integers(1, 2))
@few
def test_layers_that_do_nothing_go_first(drawn, more):
    changes: dict[str, object] = {}
    for name, _ in drawn.stacks:
        changes |= {f"{name}.norm_position": "pre", f"{name}.sharing": "none"}
    model = build(drawn.with_(changes))
    state = State(model.architecture, model.state_dict())
    for name, stack in model.architecture.stacks:
        state, _ = deepen(state, name, stack.n_layers + more)
    deep = rebuilt(state)
    done = resize(deep, {f"{n}.n_layers": s.n_layers for n, s in drawn.stacks}, calibrate=[text(drawn)])
    assert done.architecture == model.architecture
    assert all(abs(value) < 1e-9 for step in done.steps for value in step.detail.values())
    assert all(torch.equal(done.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_that_share_weights_leave_in_whole_turns():
    for sharing, wanted in (("all", 3), ("cycle:2", 4), ("groups:2", 4), ("feed_forward:groups:2", 4)):
        model = build(gpt_like(n_layers=8, sharing=sharing))
        done = resize(model, {"n_layers": wanted}, calibrate=[text(gpt_like())])
        assert dict(done.architecture.stacks)["decoder"].n_layers == wanted
        assert len(done.steps[0].detail) == 8 - wanted
        shared = "decoder.feed_forward.1.down.weight"
        if shared in done.tensors:
            assert torch.equal(done.tensors[shared], model.get_parameter(shared).detach())
        assert states(rebuilt(State(done.architecture, done.tensors))).isfinite().all()
    with pytest.raises(RequestError, match="5 layers cannot be split"):
        resize(build(gpt_like(n_layers=8, sharing="cycle:2")), {"n_layers": 5}, calibrate=[text(gpt_like())])


def test_a_layers_importance_is_how_far_it_turns_the_stream():
    model = build(gpt_like(n_layers=2))
    with torch.no_grad():
        model.get_parameter("decoder.attention.1.o.weight").mul_(30.0)
    first, second = layer_importance(model, [text(gpt_like())], "decoder").tolist()
    assert 0 < first < second <= 2


def test_a_shared_feed_forward_is_one_matrix_that_all_layers_feed():
    model = build(gpt_like(n_layers=4, sharing="all"))
    seen = activities(model, [text(gpt_like())], ["decoder.feed_forward.0.down"])
    assert seen["decoder.feed_forward.0.down"].tokens == 4 * 16 * 12
    done = resize(model, {"d_ff": 20}, calibrate=[text(gpt_like())])
    assert list(done.steps[0].detail) == ["decoder.feed_forward.0.down"]


def test_pads_do_not_count():
    batch = text(gpt_like())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 8:] = 0
    seen = activities(build(gpt_like()), [batch], ["decoder.attention.0.o"])
    assert seen["decoder.attention.0.o"].tokens == 16 * 8


def test_the_refit_writer_says_what_the_others_said():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    kept, mix = draw(500, 4) + 1.0, draw(4, 3)
    rows = torch.cat((kept, kept @ mix + 2.0), 1)  # the last three follow from the first four
    activity = Activity()
    activity.add(rows)
    weight, bias = draw(5, 7), draw(5)
    fitted = refit(weight, bias, activity, torch.arange(4))
    assert fitted.energy == pytest.approx(1.0, abs=1e-3)
    assert fitted.bias is not None
    error = kept @ fitted.weight.T + fitted.bias - (rows @ weight.T + bias)
    assert float(error.norm() / (rows @ weight.T + bias).norm()) < 1e-3


@given(architectures(max_layers=2, shapes=("encoder", "decoder")))
@few
def test_the_refit_loses_less_than_dropping(drawn):
    name, stack = next(drawn.stacks)
    model, writer = build(drawn), f"{name}.feed_forward.0.down"
    heard: list[torch.Tensor] = []
    handle = model.get_submodule(writer).register_forward_pre_hook(lambda _, x: heard.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(**text(drawn))
    handle.remove()
    activity = Activity()
    rows = torch.cat(heard)
    activity.add(rows)
    tensors = model.state_dict()
    weight, bias = tensors[f"{writer}.weight"], tensors.get(f"{writer}.bias")
    kept = torch.arange(stack.feed_forward.d_ff // 2 + 1)
    fitted = refit(weight, bias, activity, kept)
    whole = rows @ weight.T
    dropped = (whole - rows[:, kept] @ weight[:, kept].T).norm()
    offset = 0.0 if bias is None else fitted.bias - bias
    left = (whole - rows[:, kept] @ fitted.weight.T - offset).norm()
    assert float(left) <= float(dropped) * (1 + 1e-6) + 1e-9


def test_bad_requests_are_one_line():
    grouped = gpt_like(n_heads=4, n_kv_heads=2, family=None)
    for architecture, changes, calibrate, message in (
        (gpt_like(), {"d_ff": 20}, [], "fitted on text, and there is none"),
        (gpt_like(), {"n_layers": 1}, [], "fitted on text, and there is none"),
        (gpt_like(), {"d_ff": 20}, [text(gpt_like(), rows=1, length=9)], "has 9 tokens, and fitting 20 channels"),
        (gpt_like(n_heads=6, family=None), {"n_kv_heads": 2, "n_heads": 2}, [], "fitted on text, and there is none"),
        (gpt_like(n_heads=6, n_kv_heads=3, family=None), {"n_kv_heads": 2}, [], "choose 1"),
        (grouped, {"n_heads": 3, "n_kv_heads": 3}, [text(grouped)], "while query heads go; choose 2 or fewer"),
        (gpt_like(), {"n_layers": 0}, [], "n_layers=0: expected a whole number"),
    ):
        with pytest.raises(RequestError) as raised:
            resize(build(architecture), changes, calibrate=calibrate)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
