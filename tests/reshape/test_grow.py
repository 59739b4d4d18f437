"""Growth of random architectures: whatever is not refused changes no output, and its copies come apart in training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lathe.architecture import Architecture, Norm
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.grow_width import find_widening
from lathe.reshape.state import State
from tests.reshape.test_width import build, gpt_like, rebuilt, text
from tests.strategies import architectures

few = settings(max_examples=12, deadline=None)


def grown(model: Transformer, **changes: object) -> Transformer:
    """The model with other sizes; every step has to call itself exact. No text is given."""
    done = resize(model, changes)
    assert done.steps
    assert all(step.exact for step in done.steps)
    return rebuilt(State(done.architecture, done.tensors))


def grown_or_refused(model: Transformer, d_model: int) -> Transformer | str:
    try:
        return grown(model, d_model=d_model)
    except RequestError as refusal:
        return str(refusal)


def assert_same(new: Transformer, old: Transformer) -> None:
    """Equal outputs; a wider stream or pooled state is wider by channels at its end."""
    batch = text(old.architecture, rows=3, length=6, seed=1)
    with torch.no_grad():
        ours, theirs = new(**batch), old(**batch)
    for name in ("logits", "seq_relationship_logits"):
        if theirs[name] is not None:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-8)
    if new.architecture.head.language is None or not new.architecture.head.language.tied:
        d = old.architecture.d_model
        torch.testing.assert_close(ours.last_hidden_state[..., :d], theirs.last_hidden_state, rtol=1e-6, atol=1e-8)


@given(architectures(max_layers=2), st.integers(1, 9))
@few
def test_a_wider_feed_forward_changes_nothing(drawn, more):
    model = build(drawn)
    sizes = {f"{name}.feed_forward.d_ff": stack.feed_forward.d_ff + more for name, stack in drawn.stacks}
    done = resize(model, sizes)
    assert all(step.exact for step in done.steps)
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


@given(architectures(max_layers=2), st.integers(1, 3), st.integers(0, 2))
@few
def test_more_heads_change_nothing(drawn, times, more):
    model = build(drawn)
    changes: dict[str, object] = {}
    for name, stack in drawn.stacks:
        a = stack.attention
        groups = a.kv_heads + more
        changes[f"{name}.attention.n_kv_heads"] = groups
        changes[f"{name}.attention.n_heads"] = groups * (a.n_heads // a.kv_heads + times - 1)
    done = resize(model, changes)
    assert all(step.exact for step in done.steps)
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


def test_key_value_heads_of_their_own_change_nothing():
    model = build(gpt_like(n_heads=4, n_kv_heads=2, family=None))
    assert_same(grown(model, n_kv_heads=4), model)
    assert_same(grown(model, n_heads=6, n_kv_heads=6), model)


@given(architectures(max_layers=2, positions=("none", "learned", "sinusoidal", "relative")), st.integers(1, 3))
@few
def test_wider_heads_change_nothing(drawn, more):
    model = build(drawn)
    done = resize(model, {f"{name}.attention.d_head": s.attention.d_head + more for name, s in drawn.stacks})
    assert all(step.exact for step in done.steps)
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


@given(architectures(max_layers=3), st.integers(1, 3))
@few
def test_more_layers_change_nothing(drawn, more):
    changes: dict[str, object] = {}
    for name, _ in drawn.stacks:
        changes |= {f"{name}.norm_position": "pre", f"{name}.sharing": "none"}
    model = build(drawn.with_(changes))
    done = resize(model, {f"{name}.n_layers": stack.n_layers + more for name, stack in drawn.stacks})
    assert all(step.exact for step in done.steps)
    assert_same(rebuilt(State(done.architecture, done.tensors)), model)


@given(architectures(max_layers=2), st.sampled_from([1, 3, "double", "triple"]))
@settings(max_examples=50, deadline=None)
def test_a_wider_stream_changes_nothing_or_is_refused(drawn, more):
    times = {"double": 2, "triple": 3}.get(more)
    size = drawn.d_model * times if times else drawn.d_model + more
    model = build(drawn)
    wide = grown_or_refused(model, size)
    if isinstance(wide, str):
        assert "only whole copies" in wide or "add tied=false" in wide
        if times:  # whole copies are refused for nothing but a tied head
            assert "add tied=false" in wide
            assert_same(grown(model, d_model=size, tied=False), model)
        return
    assert wide.architecture.d_model == size
    assert_same(wide, model)


@given(architectures(max_layers=2, language=True))
@few
def test_an_untied_head_says_what_the_tied_one_said(drawn):
    assume(drawn.head.language.tied)
    model = build(drawn)
    assert_same(grown(model, tied=False), model)


def test_everything_grows_in_one_call():
    model = build(gpt_like())
    wide = grown(model, d_model=50, d_ff=64, n_heads=3, d_head=10, n_layers=5)
    assert_same(wide, model)
    assert dict(wide.architecture.stacks)["decoder"].n_layers == 5


def test_a_cut_and_a_growth_in_one_call():
    model = build(gpt_like())
    done = resize(model, {"n_layers": 1, "d_ff": 64, "d_model": 40}, calibrate=[text(gpt_like())])
    assert [step.exact for step in done.steps] == [False, True, True]
    cut = resize(model, {"n_layers": 1}, calibrate=[text(gpt_like())])
    assert_same(rebuilt(State(done.architecture, done.tensors)), rebuilt(State(cut.architecture, cut.tensors)))


def trained(model: Transformer, steps: int = 4) -> Transformer:
    batch = text(model.architecture)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train().requires_grad_(True)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("position", ["pre", "post"])
def test_copies_of_a_channel_come_apart_in_training(position):
    architecture = gpt_like(norm_position=position).with_({"decoder.final_norm": position == "pre"})
    wide = grown(build(architecture), d_model=64)
    for name in ("embedding.tokens.weight", "decoder.feed_forward.0.down.weight", "decoder.attention.0.o.weight"):
        before = wide.get_parameter(name)
        dim = 1 if "tokens" in name else 0
        first, second = before.chunk(2, dim)
        assert torch.equal(first, second)
    wide = trained(wide)
    for name in ("embedding.tokens.weight", "decoder.feed_forward.0.down.weight", "decoder.attention.0.o.weight"):
        first, second = wide.get_parameter(name).detach().chunk(2, 1 if "tokens" in name else 0)
        assert float((first - second).norm() / first.norm()) > 1e-4, name


def test_what_is_new_learns():
    wide = grown(build(gpt_like()), d_model=45, d_ff=48, n_heads=3, d_head=10, n_layers=3)
    before = {name: tensor.detach().clone() for name, tensor in wide.named_parameters()}
    wide = trained(wide, steps=2)
    for name, tensor in wide.named_parameters():
        assert not torch.equal(tensor, before[name]), name
    down = wide.get_parameter("decoder.feed_forward.0.down.weight")[:, 40:]
    assert int(torch.linalg.matrix_rank(down)) == 8  # eight new neurons that do eight different things


def refused(architecture: Architecture, message: str, **changes: object) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        resize(build(architecture), changes)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_exact_is_refused_with_the_sizes_that_can():
    post = gpt_like(norm_position="post")
    refused(post, "post-norm with LayerNorm, so only whole copies of the 32 channels .* choose 64", d_model=48)
    refused(post, "a post-norm layer that adds nothing still norms", n_layers=3)
    refused(gpt_like(sharing="feed_forward"), "would share weights that write", n_layers=4)
    refused(
        gpt_like(n_heads=3, n_kv_heads=1, family=None),
        r"choose 3 or more query heads for each",
        n_heads=4,
        n_kv_heads=2,
    )
    rotary = gpt_like().with_({"decoder.positions.kind": "rotary"})
    refused(rotary, "rotary positions fix d_head at 8", d_head=10)
    bare = gpt_like().with_({"decoder.final_norm": False})
    refused(bare, "a tied head reads the stream without a norm", d_model=40)
    refused(bare, "add tied=false", d_model=64)


def test_which_streams_take_any_width():
    for norm, size in ((Norm(kind="rms"), 33), (Norm(), 71)):
        how = find_widening(gpt_like().with_({"decoder.norm": norm}), size)
        assert how.copies * 32 + how.spare == size


def test_the_same_growth_twice_gives_the_same_weights():
    model = build(gpt_like())
    one, two = (resize(model, {"d_model": 40, "d_ff": 50}).tensors for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
