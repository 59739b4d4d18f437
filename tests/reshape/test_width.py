"""Widths of random architectures: exact where the mathematics says so, labelled and small where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lathe.architecture import Architecture, Head, LanguageHead
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape import resize
from lathe.reshape.calibrate import moments
from lathe.reshape.fold import fold
from lathe.reshape.heads import narrow_heads
from lathe.reshape.state import State
from lathe.reshape.width import is_centred, norms_of, principal, rotate, without_mean
from tests.strategies import architectures

few = settings(max_examples=25, deadline=None)


def build(architecture: Architecture, seed: int = 0) -> Transformer:
    """A model in float64 whose every tensor, norms and biases too, is drawn at random."""
    model = Transformer(architecture, seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def text(architecture: Architecture, rows: int = 16, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of keyword arguments for a model of any stacks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, architecture.embedding.vocab_size, (rows, length), generator=generator)
    ids[:, -1] = architecture.tokens.eos[0] if architecture.tokens.eos else 0  # a pooler may look for it
    both = architecture.encoder is not None and architecture.decoder is not None
    return {"input_ids": ids, "decoder_input_ids": ids.flip(0).contiguous()} if both else {"input_ids": ids}


def rebuilt(state: State) -> Transformer:
    state = state.cast(torch.float64)
    model = Transformer(state.architecture, device="meta")
    model.load_state_dict(dict(state.tensors), assign=True)
    return model.eval()


def rotated(model: Transformer, width: int) -> tuple[Transformer, bool]:
    architecture, batch = model.architecture, text(model.architecture)
    norms, centred = norms_of(architecture, "residual"), is_centred(architecture, "residual")
    seen = moments(model, [batch], norms)
    state = State(architecture, model.state_dict())
    state, step = rotate(state, "residual", "d_model", principal(seen, norms, width, centred=centred), seen)
    return rebuilt(state), step.exact


def with_pre_norm(architecture: Architecture) -> Architecture:
    """The architecture as a rotation needs it, with an untied head and no norm on the embeddings."""
    kind = next(architecture.stacks)[1].norm
    changes: dict[str, Any] = {"head": Head(language=LanguageHead(tied=False, scaled=True))}
    for name, _ in architecture.stacks:
        changes |= {f"{name}.norm": kind, f"{name}.norm_position": "pre", f"{name}.input_norm": False}
        changes[f"{name}.final_norm"] = True
    return architecture.with_(changes)


@given(architectures(max_layers=2))
@few
def test_a_rotation_at_the_same_width_is_exact(drawn):
    model = build(with_pre_norm(drawn))
    same, exact = rotated(model, model.architecture.d_model)
    assert exact
    batch = text(model.architecture, seed=1)
    torch.testing.assert_close(same(**batch).logits, model(**batch).logits, rtol=1e-7, atol=1e-9)


@given(architectures(max_layers=2, language=True))
@few
def test_folding_norms_into_their_readers_is_exact(drawn):
    model = build(drawn)
    batch = text(drawn, seed=1)
    state = fold(State(drawn, model.state_dict()), norms_of(drawn, "residual") + norms_of(drawn, "embed"))
    assert state.architecture == drawn  # a file that could hold the model still can
    folded = rebuilt(state)
    torch.testing.assert_close(folded(**batch).logits, model(**batch).logits, rtol=1e-7, atol=1e-9)


@given(architectures(max_layers=2), st.sampled_from(["encoder", "decoder"]))
@few
def test_heads_narrowed_to_their_own_width_are_exact(drawn, name):
    stack = dict(drawn.stacks).get(name)
    assume(stack is not None)
    assert stack is not None
    assume(stack.positions.kind != "rotary")
    model, batch = build(drawn.with_(head=Head())), text(drawn, seed=1)
    state, step = narrow_heads(State(model.architecture, model.state_dict()), name, stack.attention.d_head)
    assert step.exact
    torch.testing.assert_close(
        rebuilt(state)(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=1e-6, atol=1e-8
    )


@given(architectures(max_layers=2, language=True), st.sampled_from(["truncate", "select"]))
@few
def test_keeping_every_channel_is_exact(drawn, method):
    model, batch = build(drawn), text(drawn)
    same = resize(model, {"d_model": drawn.d_model}, calibrate=[batch], method=method)
    assert same.architecture == drawn
    kept = rebuilt(State(same.architecture, same.tensors))
    torch.testing.assert_close(kept(**batch).logits, model(**batch).logits)


@given(architectures(max_layers=2), st.sampled_from(["truncate", "select"]))
@few
def test_any_architecture_can_be_truncated_and_selected(drawn, method):
    width = drawn.d_model // 2
    batch = text(drawn)
    cut = resize(build(drawn), {"d_model": width}, calibrate=[batch], method=method, refit=False)
    assert cut.architecture.d_model == width
    assert not cut.steps[-1].exact
    out = rebuilt(State(cut.architecture, cut.tensors))(**batch)
    assert out.last_hidden_state.shape[-1] == width
    assert out.last_hidden_state.isfinite().all()


def low_rank(model: Transformer, rank: int) -> None:
    """Make the residual stream live in `rank` directions: what writes it writes nothing else."""
    d = model.architecture.d_model
    basis = torch.linalg.qr(torch.randn(d, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    if is_centred(model.architecture, "residual"):
        basis = torch.linalg.qr(basis - basis.mean(0)).Q
    onto = basis @ basis.T
    with torch.no_grad():
        for parameter, dim in State(model.architecture, {}).along("residual"):
            if parameter.role in ("table", "writer"):
                tensor = model.get_parameter(parameter.name)
                tensor.copy_((tensor.movedim(dim, -1) @ onto).movedim(-1, dim))


@given(architectures(max_layers=2, positions=("none", "learned", "rotary", "relative")))
@few
def test_a_stream_of_lower_rank_is_cut_without_loss(drawn):
    architecture = with_pre_norm(drawn).with_(d_model=16)
    model = build(architecture)
    low_rank(model, 9)
    cut, exact = rotated(model, 10)  # one more than the rank: a LayerNorm's stream needs a direction for its mean
    assert not exact
    assert cut.architecture.d_model == 10
    batch = text(architecture, seed=1)
    torch.testing.assert_close(cut(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-8)


def test_rotation_loses_less_than_truncation_on_a_trained_like_stream():
    architecture = with_pre_norm(gpt_like())
    model = build(architecture)
    low_rank(model, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    batch, test = text(architecture), text(architecture, seed=1)
    errors = {}
    for method in ("truncate", "select", "rotate"):
        cut = resize(model, {"d_model": 16, "n_heads": 2, "d_head": 8}, calibrate=[batch], method=method)
        out = rebuilt(State(cut.architecture, cut.tensors))(**test).logits
        errors[method] = float((out - model(**test).logits).detach().norm())
    assert errors["rotate"] < 0.5 * errors["select"] < errors["truncate"]


def gpt_like(**changes: Any) -> Architecture:
    return Architecture.from_dict(
        {
            "d_model": 32,
            "embedding": {"vocab_size": 60},
            "decoder": {
                "n_layers": 2,
                "causal": True,
                "attention": {"n_heads": 2, "d_head": 8},
                "feed_forward": {"d_ff": 40},
                "positions": {"kind": "learned", "max_positions": 24},
            },
            "head": {"language": {"tied": True}},
            "family": "gpt2",
        }
    ).with_(**changes)


def test_heads_that_fill_the_width_go_on_filling_it():
    architecture = gpt_like(d_head=16)
    cut = resize(build(architecture), {"d_model": 24}, calibrate=[text(architecture)])
    assert cut.architecture.decoder is not None
    assert cut.architecture.decoder.attention.d_head == 12
    names = [step.name for step in cut.steps]
    assert names[:2] == ["narrow decoder heads 16 → 12", "rotate d_model 32 → 24"]
    assert names[2].startswith("refit at d_model 24")


def test_a_width_that_the_heads_cannot_fill_is_refused():
    with pytest.raises(
        RequestError, match=r"choose a multiple of 2 \(\d+ or \d+\), or give decoder\.attention\.n_heads too"
    ):
        resize(build(gpt_like(d_head=16)), {"d_model": 25}, calibrate=[text(gpt_like())])


def test_the_basis_at_the_old_width_leaves_the_channels_as_they_are():
    model = build(gpt_like())  # tied, with an uneven weight in the norm that the table reads
    same, exact = rotated(model, 32)
    assert exact
    batch = text(model.architecture, seed=1)
    torch.testing.assert_close(same(**batch).logits, model(**batch).logits, rtol=1e-7, atol=1e-9)


def test_a_scaled_table_is_cut_like_a_table_that_holds_the_scale():
    for head in (
        LanguageHead(tied=True, transform="gelu", bias=True),
        LanguageHead(tied=True),
        LanguageHead(tied=False),
    ):
        changes = {"head": Head(language=head), "embedding.scaled": True}
        for more in ({}, {"d_embed": 12}):
            scaled = build(gpt_like(**more).with_(changes))
            plain = Transformer(scaled.architecture.with_({"embedding.scaled": False}), seed=0).double().eval()
            plain.load_state_dict(scaled.state_dict())
            width = scaled.architecture.width
            with torch.no_grad():
                plain.embedding.tokens.weight.mul_(width**0.5)
                # The head reads the table too: what it is given has to be smaller by as much.
                for part in ("head.language.norm", "head.language.projection", "decoder.norm"):
                    names = [n for n, _ in plain.named_parameters() if n.startswith(part)]
                    if head.tied and names:
                        for name in names:
                            plain.get_parameter(name).mul_(width**-0.5)
                        break
            batch, test = text(scaled.architecture), text(scaled.architecture, seed=1)
            with torch.no_grad():
                torch.testing.assert_close(scaled(**test).logits, plain(**test).logits)
                for field in ("d_model", *more):
                    cut = [resize(m, {field: 8}, calibrate=[batch], refit=False) for m in (scaled, plain)]
                    one, other = (rebuilt(State(c.architecture, c.tensors))(**test).logits for c in cut)
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_basis_without_a_mean_is_orthonormal():
    for width in (1, 2, 3, 17):
        basis = without_mean(width)
        torch.testing.assert_close(basis.T @ basis, torch.eye(width - 1, dtype=torch.float64))
        torch.testing.assert_close(basis.sum(0), torch.zeros(width - 1, dtype=torch.float64))


def test_bad_requests_are_one_line():
    model, batch = build(gpt_like()), text(gpt_like())
    for changes, method, message in (
        ({"d_model": 24}, "squeeze", "method='squeeze': expected one of rotate, select, truncate"),
        ({"d_model": 0}, "rotate", "d_model=0: expected a whole number"),
        ({"activation": "relu"}, "rotate", "cannot change decoder.feed_forward.activation of a trained model"),
        ({"d_modle": 24}, "rotate", "unknown field 'd_modle'"),
    ):
        with pytest.raises(RequestError) as raised:
            resize(model, changes, calibrate=[batch], method=method)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_no_calibration_text_is_refused_where_it_is_needed():
    with pytest.raises(RequestError, match="fitted on text, and there is none"):
        resize(build(gpt_like()), {"d_model": 24}, method="rotate")
    assert resize(build(gpt_like()), {"d_model": 24}, method="truncate").architecture.d_model == 24


def test_rotary_heads_cannot_be_narrowed():
    architecture = gpt_like().with_({"decoder.positions.kind": "rotary"})
    with pytest.raises(RequestError, match="rotary positions fix d_head at 8"):
        resize(build(architecture), {"d_head": 4}, calibrate=[text(architecture)])
