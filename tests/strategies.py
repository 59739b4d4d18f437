"""Random legal architectures, small enough to build and run in a test.

`architectures()` draws over every choice that an `Architecture` has, and so over many combinations that
no published family is. Restrict it where a test needs that:

    @given(architectures(shapes=("decoder",), positions=("rotary",)))
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from lathe.architecture import (
    ACTIVATIONS,
    POSITIONS,
    Architecture,
    Attention,
    Classifier,
    Dropout,
    Embedding,
    FeedForward,
    Head,
    Initialisation,
    LanguageHead,
    Norm,
    Pooler,
    Positions,
    RotaryScaling,
    Sharing,
    Stack,
    Tokens,
)

SHAPES = ("encoder", "decoder", "both")
# Every position that a small architecture's tables have; a test's sequences stay within it.
MAX_POSITIONS = 24

PAD, BOS, EOS, MASK = 0, 1, 2, 3
YES_NO = (False, True)


@functools.cache
def _one_of(options: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    # Made once for each set of options: hypothesis checks every new strategy, and that took half the time.
    return st.sampled_from(options)


def _pick(draw: st.DrawFn, *options: Any) -> Any:
    return draw(_one_of(options))


@st.composite
def sharings(draw: st.DrawFn, n_layers: int) -> Sharing:
    """Any sharing pattern that `n_layers` can be divided into."""
    half = _pick(draw, None, (True, True), (True, False), (False, True))
    if half is None:
        return Sharing()
    groups = _pick(draw, *_divisors(n_layers))
    cycle = _pick(draw, *_divisors(n_layers // groups))
    return Sharing(attention=half[0], feed_forward=half[1], groups=groups, cycle=cycle)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def norms(draw: st.DrawFn) -> Norm:
    """LayerNorm with and without a bias, and RMSNorm."""
    kind, bias = _pick(draw, ("layer", True), ("layer", False), ("rms", False))
    return Norm(kind=kind, eps=_pick(draw, 1e-12, 1e-6, 1e-5), bias=bias)


@st.composite
def positions(draw: st.DrawFn, kinds: Sequence[str] = POSITIONS) -> Positions:
    """Positions of the given kinds, every table `MAX_POSITIONS` long."""
    kind = _pick(draw, *kinds)
    if kind == "none":
        return Positions()
    if kind == "relative":
        return Positions(kind=kind, n_buckets=_pick(draw, 4, 8), max_distance=_pick(draw, 8, 16))
    if kind == "learned":
        return Positions(kind=kind, max_positions=MAX_POSITIONS, offset=_pick(draw, 0, 2))
    if kind == "sinusoidal":
        return Positions(kind=kind, max_positions=MAX_POSITIONS)
    scaling = None
    if _pick(draw, *YES_NO):
        scaling = RotaryScaling(
            kind=_pick(draw, "linear", "llama3"),
            factor=_pick(draw, 1.0, 2.0, 8.0),
            original_max_positions=_pick(draw, 4, 16),
        )
    return Positions(kind=kind, max_positions=MAX_POSITIONS, theta=_pick(draw, 100.0, 10000.0), scaling=scaling)


@st.composite
def stacks(
    draw: st.DrawFn,
    *,
    causal: bool = False,
    cross_attention: bool = False,
    kinds: Sequence[str] = POSITIONS,
    max_layers: int = 4,
) -> Stack:
    """One stack of up to `max_layers` layers."""
    n_layers = _pick(draw, *range(1, max_layers + 1))
    where = draw(positions(kinds))
    n_heads = _pick(draw, 1, 2, 3, 4)
    attention = Attention(
        n_heads=n_heads,
        # Rotary positions turn pairs of channels; the others take an odd head as well.
        d_head=_pick(draw, 2, 4, 6) if where.kind == "rotary" else _pick(draw, 2, 3, 4, 5),
        n_kv_heads=_pick(draw, None, *_divisors(n_heads)),
        bias=_pick(draw, *YES_NO),
        output_bias=_pick(draw, *YES_NO),
        scaled=_pick(draw, *YES_NO),
        window=_pick(draw, None, 1, 3, 8) if causal else None,
    )
    feed_forward = FeedForward(
        d_ff=_pick(draw, 3, 8, 10, 20),
        activation=_pick(draw, *ACTIVATIONS),
        gated=_pick(draw, *YES_NO),
        bias=_pick(draw, *YES_NO),
    )
    return Stack(
        n_layers=n_layers,
        attention=attention,
        feed_forward=feed_forward,
        norm=draw(norms()),
        norm_position=_pick(draw, "pre", "post"),
        input_norm=_pick(draw, *YES_NO),
        final_norm=_pick(draw, *YES_NO),
        positions=where,
        causal=causal,
        cross_attention=cross_attention,
        sharing=draw(sharings(n_layers)),
    )


@st.composite
def heads(draw: st.DrawFn, *, language: bool | None = None) -> Head:
    """Any heads; `language` insists on one that predicts tokens, or on none."""
    wanted = _pick(draw, *YES_NO) if language is None else language
    tokens = None
    if wanted:
        tokens = LanguageHead(
            tied=_pick(draw, *YES_NO),
            transform=_pick(draw, None, *ACTIVATIONS),
            bias=_pick(draw, *YES_NO),
            scaled=_pick(draw, *YES_NO),
            offset=_pick(draw, *YES_NO),
        )
    pooler = classifier = None
    token = _pick(draw, None, "first", "last", "eos", "each")
    if token is not None:
        pooler = Pooler(token=token, activation=_pick(draw, None, *ACTIVATIONS))
        if _pick(draw, *YES_NO):
            classifier = Classifier(n_labels=_pick(draw, 1, 2, 5), bias=_pick(draw, *YES_NO))
    return Head(language=tokens, pooler=pooler, classifier=classifier)


@st.composite
def architectures(
    draw: st.DrawFn,
    *,
    shapes: Sequence[str] = SHAPES,
    positions: Sequence[str] = POSITIONS,
    language: bool | None = None,
    dropout: bool = False,
    max_layers: int = 4,
) -> Architecture:
    """A small architecture: widths below 25, a vocabulary below 60, at most `max_layers` layers a stack.

    Args:
        shapes: which of `encoder`, `decoder` and `both` may come.
        positions: which kinds of positions may come.
        language: whether there is a language head; None leaves it to chance.
        dropout: whether training may drop anything.
        max_layers: the deepest stack.
    """
    shape = _pick(draw, *shapes)
    encoder = decoder = None
    if shape != "decoder":
        encoder = draw(stacks(kinds=positions, max_layers=max_layers))
    if shape != "encoder":
        decoder = draw(stacks(causal=True, cross_attention=shape == "both", kinds=positions, max_layers=max_layers))
    rates = (0.0, 0.1, 0.5) if dropout else (0.0,)
    d_embed = _pick(draw, None, 2, 5, 10)
    return Architecture(
        d_model=_pick(draw, 4, 6, 8, 12, 16, 24),
        embedding=Embedding(
            vocab_size=_pick(draw, 8, 29, 59),
            d_embed=d_embed,
            projection_bias=d_embed is not None and _pick(draw, *YES_NO),
            token_types=_pick(draw, 0, 0, 2),
            scaled=_pick(draw, *YES_NO),
        ),
        encoder=encoder,
        decoder=decoder,
        head=draw(heads(language=language)),
        tokens=Tokens(pad=PAD, bos=BOS, eos=(EOS,), decoder_start=PAD if shape == "both" else None, mask=MASK),
        dropout=Dropout(**{name: _pick(draw, *rates) for name in Dropout.field_names()}),
        initialisation=Initialisation(
            kind=_pick(draw, "normal", "fan_in"),
            std=_pick(draw, 0.02, 0.1),
            scaled_residual=_pick(draw, *YES_NO),
        ),
    )
