"""The one transformer over random architectures: names, masks, packing, cache, sharing, memory, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.architecture import Architecture, Head, Sharing
from lathe.blueprint import count, stored
from lathe.errors import RequestError
from lathe.model.cache import Cache
from lathe.model.transformer import Transformer
from lathe.presets import preset
from tests.strategies import EOS, MAX_POSITIONS, architectures

few = settings(max_examples=20, deadline=None)


def build(architecture: Architecture, seed: int = 0) -> Transformer:
    """A model without heads, in float64, whose every tensor, norms and biases too, is drawn at random."""
    architecture = architecture.with_(head=Head())
    model = Transformer(architecture, seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def ids(architecture: Architecture, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, architecture.embedding.vocab_size, (batch, length), generator=generator)
    drawn[:, -1] = EOS
    return drawn


def hidden(model: Transformer, tokens: torch.Tensor, **more: object) -> torch.Tensor:
    """The last stack's hidden states for `tokens`, with a fixed source where there are two stacks."""
    if model.encoder is not None and model.decoder is not None:
        source = ids(model.architecture, tokens.shape[0], 5, seed=9)
        return model(source, decoder_input_ids=tokens, **{f"decoder_{k}": v for k, v in more.items()}).last_hidden_state
    return model(tokens, **more).last_hidden_state


@given(architectures())
@few
def test_parameters_are_the_blueprints(architecture):
    model = Transformer(architecture, seed=0)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {p.name: p.shape for p in stored(architecture)}
    assert sum(p.numel() for p in model.parameters()) == count(architecture)


@given(architectures())
@few
def test_every_architecture_runs_and_trains(architecture):
    model = Transformer(architecture, seed=0).train()
    tokens = ids(architecture, 2, 6)
    both = architecture.encoder is not None and architecture.decoder is not None
    out = model(tokens, **({"decoder_input_ids": tokens} if both else {}))
    total = sum(t.square().sum() for t in (out.logits, out.last_hidden_state, out.pooler_output) if t is not None)
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert out.last_hidden_state.shape == (2, 6, architecture.d_model)


@given(architectures(), st.integers(1, 4))
@few
def test_pads_on_the_right_change_nothing(architecture, pads):
    model, tokens = build(architecture), ids(architecture, 2, 5)
    padded = torch.cat((tokens, torch.zeros(2, pads, dtype=torch.long)), 1)
    mask = (torch.arange(5 + pads) < 5).long().expand(2, -1)
    torch.testing.assert_close(hidden(model, padded, attention_mask=mask)[:, :5], hidden(model, tokens))


@given(architectures())
@few
def test_a_packed_row_is_its_documents_alone(architecture):
    model = build(architecture)
    first, second = ids(architecture, 1, 4, seed=1), ids(architecture, 1, 3, seed=2)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    row = torch.cat((first, second), 1)
    if architecture.encoder is not None and architecture.decoder is not None:
        packed = model(
            row,
            segment_ids=segments,
            position_ids=places,
            decoder_input_ids=row,
            decoder_segment_ids=segments,
            decoder_position_ids=places,
        ).last_hidden_state
        apart = [model(each, decoder_input_ids=each).last_hidden_state for each in (first, second)]
    else:
        packed = model(row, segment_ids=segments, position_ids=places).last_hidden_state
        apart = [model(each).last_hidden_state for each in (first, second)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


@given(architectures(shapes=("decoder", "both")), st.lists(st.integers(1, 6), min_size=2, max_size=3), st.data())
@few
def test_a_ragged_cache_gives_what_the_whole_row_gives(architecture, lengths, data):
    model = build(architecture)
    longest, steps = max(lengths), 3
    tokens = ids(architecture, len(lengths), longest + steps, seed=3)
    both = architecture.encoder is not None
    source = {"encoder_outputs": model.encode(ids(architecture, len(lengths), 5, seed=9))} if both else {}
    name = "decoder_{}" if both else "{}"
    cache = Cache(architecture, len(lengths), longest + steps, dtype=torch.float64)
    left = data.draw(st.booleans())
    column = torch.arange(longest)
    mask = torch.stack([(column >= longest - n) if left else (column < n) for n in lengths]).long()
    prompt = torch.zeros(len(lengths), longest, dtype=torch.long)
    prompt[mask.bool()] = torch.cat([tokens[row, :n] for row, n in enumerate(lengths)])
    given_ids, given_mask = name.format("input_ids"), name.format("attention_mask")
    seen = [
        model(**{given_ids: prompt, given_mask: mask}, **source, past_key_values=cache).last_hidden_state[mask.bool()]
    ]
    for step in range(steps):
        new = torch.stack([tokens[row, n + step] for row, n in enumerate(lengths)])[:, None]
        seen.append(model(**{given_ids: new}, **source, past_key_values=cache).last_hidden_state[:, 0])
    for row, n in enumerate(lengths):
        row_source = (
            {"encoder_outputs": model.encode(ids(architecture, len(lengths), 5, seed=9)[row : row + 1])} if both else {}
        )
        whole = model(**{given_ids: tokens[row : row + 1, : n + steps]}, **row_source).last_hidden_state[0]
        start = sum(lengths[:row])
        torch.testing.assert_close(seen[0][start : start + n], whole[:n])
        for step in range(steps):
            torch.testing.assert_close(seen[1 + step][row], whole[n + step])


@given(architectures(max_layers=4))
@few
def test_shared_layers_are_copies_that_cannot_differ(architecture):
    shared = build(architecture)
    apart_architecture = shared.architecture.with_({f"{name}.sharing": Sharing() for name, _ in architecture.stacks})
    apart = Transformer(apart_architecture).double().eval()
    weights = shared.state_dict()
    for name, stack in architecture.stacks:
        for kind, index in (
            ("attention", stack.attention_index),
            ("cross_attention", stack.attention_index),
            ("feed_forward", stack.feed_forward_index),
        ):
            for layer in range(stack.n_layers):
                source = f"{name}.{kind}.{index(layer)}."
                for key, tensor in shared.state_dict().items():
                    if key.startswith(source):
                        weights[f"{name}.{kind}.{layer}.{key.removeprefix(source)}"] = tensor
    apart.load_state_dict({k: v for k, v in weights.items() if k in apart.state_dict()})
    tokens = ids(architecture, 2, 5)
    torch.testing.assert_close(hidden(apart, tokens), hidden(shared, tokens))


@given(architectures())
@few
def test_recomputing_activations_changes_no_gradient(architecture):
    tokens = ids(architecture, 2, 5)
    grads = []
    for on in (False, True):
        model = build(architecture).train()
        model.set_checkpointing(on)
        hidden(model, tokens).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@given(architectures())
@few
def test_asking_for_weights_changes_no_output(architecture):
    model, tokens = build(architecture), ids(architecture, 2, 5)
    both = architecture.encoder is not None and architecture.decoder is not None
    more = {"decoder_input_ids": tokens} if both else {}
    plain = model(tokens, **more)
    told = model(tokens, **more, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(told.last_hidden_state, plain.last_hidden_state)
    stacks = dict(architecture.stacks)
    last = stacks.get("decoder") or stacks["encoder"]
    weights = told.decoder_attentions if both else told.attentions
    states = told.decoder_hidden_states if both else told.hidden_states
    assert len(weights) == last.n_layers
    assert len(states) == last.n_layers + 1
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, last.attention.n_heads, 5, dtype=torch.float64))
    torch.testing.assert_close(states[-1], told.last_hidden_state)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    architecture = small()
    one, same, other = (Transformer(architecture, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.tokens.weight"], other["embedding.tokens.weight"])


def small(**changes: object) -> Architecture:
    return preset("t5-small").with_(d_model=16, d_ff=24, n_layers=1, n_heads=2, d_head=4, vocab_size=50, **changes)


def test_an_id_outside_the_vocabulary_is_named_with_its_place():
    model = Transformer(small(), seed=0)
    with pytest.raises(RequestError, match=r"token id 50 at row 1, position 2 is outside the vocabulary of 50"):
        model(torch.tensor([[1, 2, 3], [4, 5, 50]]), decoder_input_ids=torch.tensor([[0], [0]]))
    with pytest.raises(RequestError, match=r"token id -1 at row 0, position 0"):
        model(torch.tensor([[-1, 2]]), decoder_input_ids=torch.tensor([[0]]))


def test_ids_of_another_kind_or_shape_are_refused():
    model = Transformer(small(), seed=0)
    with pytest.raises(RequestError, match="float32: expected whole numbers"):
        model(torch.zeros(1, 3), decoder_input_ids=torch.tensor([[0]]))
    with pytest.raises(RequestError, match=r"shape \(3,\): expected batch × length"):
        model(torch.tensor([1, 2, 3]), decoder_input_ids=torch.tensor([[0]]))


def test_a_sequence_longer_than_the_positions_is_refused():
    architecture = preset("gpt2").with_(
        d_model=16, n_heads=2, d_head=8, d_ff=24, n_layers=1, vocab_size=50, max_positions=MAX_POSITIONS
    )
    model = Transformer(architecture, seed=0)
    with pytest.raises(RequestError, match="25 tokens is longer than this model's 24 positions"):
        model(torch.ones(1, 25, dtype=torch.long))


def test_an_encoder_decoder_without_decoder_inputs_says_what_it_needs():
    with pytest.raises(RequestError, match="needs decoder_input_ids, or labels"):
        Transformer(small(), seed=0)(torch.tensor([[1, 2]]))


def test_a_label_outside_the_vocabulary_is_named():
    with pytest.raises(RequestError, match=r"label 77 at \[0, 1\]: expected 0 to 49"):
        Transformer(small(), seed=0)(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 77]]))


def test_a_full_cache_refuses_more():
    architecture = small()
    model = Transformer(architecture, seed=0)
    memory = model.encode(torch.tensor([[1, 2]]))
    cache = Cache(architecture, 1, 2)
    model(encoder_outputs=memory, decoder_input_ids=torch.tensor([[0, 5]]), past_key_values=cache)
    with pytest.raises(RequestError, match="3 tokens for a cache of 2"):
        model(encoder_outputs=memory, decoder_input_ids=torch.tensor([[6]]), past_key_values=cache)


def test_an_encoder_has_no_cache():
    with pytest.raises(RequestError, match="a cache needs a decoder"):
        Cache(preset("bert-base-uncased"), 1, 2)


def test_labels_make_the_decoder_inputs():
    model = Transformer(small(), seed=0).eval()
    labels = torch.tensor([[7, 8, 1], [9, 1, -100]])
    shifted = torch.tensor([[0, 7, 8], [0, 9, 1]])
    source = torch.tensor([[5, 6], [6, 7]])
    by_labels = model(source, labels=labels)
    by_ids = model(source, decoder_input_ids=shifted)
    torch.testing.assert_close(by_labels.logits, by_ids.logits)
    expected = torch.nn.functional.cross_entropy(by_ids.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(by_labels.loss, expected)
