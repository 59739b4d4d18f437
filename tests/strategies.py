"""Random legal architectures, small enough to build and run in a test.

`architectures()` draws over every choice that an `Architecture` has, and so over many combinations that
no published family is. Restrict it where a test needs that:

    @given(architectures(shapes=("decoder",), positions=("rotary",)))
"""

from __future__ import annotations

from collections.abc import Sequence

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


def sharings(n_layers: int) -> st.SearchStrategy[Sharing]:
    """Every sharing pattern that `n_layers` can be divided into."""
    whole = [(g, c) for g in range(1, n_layers + 1) for c in range(1, n_layers + 1) if _divides(n_layers, g, c)]
    halves = st.sampled_from([(True, True), (True, False), (False, True)])
    shared = st.builds(
        lambda half, cut: Sharing(attention=half[0], feed_forward=half[1], groups=cut[0], cycle=cut[1]),
        halves,
        st.sampled_from(whole),
    )
    return st.just(Sharing()) | shared


def _divides(n_layers: int, groups: int, cycle: int) -> bool:
    return n_layers % groups == 0 and (n_layers // groups) % cycle == 0


def norms() -> st.SearchStrategy[Norm]:
    """LayerNorm with and without a bias, and RMSNorm."""
    eps = st.sampled_from([1e-12, 1e-6, 1e-5])
    layer = st.builds(Norm, kind=st.just("layer"), eps=eps, bias=st.booleans())
    return layer | st.builds(Norm, kind=st.just("rms"), eps=eps, bias=st.just(False))


def positions(kinds: Sequence[str] = POSITIONS) -> st.SearchStrategy[Positions]:
    """Positions of the given kinds, every table `MAX_POSITIONS` long."""
    limit = st.just(MAX_POSITIONS)
    scaling = st.none() | st.builds(
        RotaryScaling,
        kind=st.sampled_from(["linear", "llama3"]),
        factor=st.sampled_from([1.0, 2.0, 8.0]),
        original_max_positions=st.sampled_from([4, 16]),
    )
    each = {
        "none": st.just(Positions()),
        "learned": st.builds(Positions, kind=st.just("learned"), max_positions=limit, offset=st.sampled_from([0, 2])),
        "sinusoidal": st.builds(Positions, kind=st.just("sinusoidal"), max_positions=limit),
        "rotary": st.builds(
            Positions,
            kind=st.just("rotary"),
            max_positions=limit,
            theta=st.sampled_from([100.0, 10000.0]),
            scaling=scaling,
        ),
        "relative": st.builds(
            Positions,
            kind=st.just("relative"),
            n_buckets=st.sampled_from([4, 8]),
            max_distance=st.sampled_from([8, 16]),
        ),
    }
    return st.one_of([each[kind] for kind in kinds])


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
    n_layers = draw(st.integers(1, max_layers))
    where = draw(positions(kinds))
    n_heads = draw(st.integers(1, 4))
    n_kv_heads = draw(st.sampled_from([None, *(n for n in range(1, n_heads + 1) if n_heads % n == 0)]))
    attention = Attention(
        n_heads=n_heads,
        # Rotary positions turn pairs of channels; the others take an odd head as well.
        d_head=draw(st.sampled_from([2, 4, 6] if where.kind == "rotary" else [2, 3, 4, 5])),
        n_kv_heads=n_kv_heads,
        bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        scaled=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 8)) if causal else None,
    )
    feed_forward = FeedForward(
        d_ff=draw(st.integers(3, 20)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    return Stack(
        n_layers=n_layers,
        attention=attention,
        feed_forward=feed_forward,
        norm=draw(norms()),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        input_norm=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        positions=where,
        causal=causal,
        cross_attention=cross_attention,
        sharing=draw(sharings(n_layers)),
    )


@st.composite
def heads(draw: st.DrawFn, *, language: bool | None = None) -> Head:
    """Any heads; `language` insists on one that predicts tokens, or on none."""
    wanted = draw(st.booleans()) if language is None else language
    activation = st.none() | st.sampled_from(ACTIVATIONS)
    tokens = None
    if wanted:
        tokens = LanguageHead(
            tied=draw(st.booleans()),
            transform=draw(activation),
            bias=draw(st.booleans()),
            scaled=draw(st.booleans()),
            offset=draw(st.booleans()),
        )
    pooler = draw(st.none() | st.builds(Pooler, token=st.sampled_from(["first", "last", "eos", "each"])))
    if pooler is not None:
        pooler = Pooler(token=pooler.token, activation=draw(activation))
    classifier = None
    if pooler is not None and draw(st.booleans()):
        classifier = Classifier(n_labels=draw(st.integers(1, 5)), bias=draw(st.booleans()))
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
    shape = draw(st.sampled_from(list(shapes)))
    d_model = draw(st.sampled_from([4, 6, 8, 12, 16, 24]))
    encoder = decoder = None
    if shape != "decoder":
        encoder = draw(stacks(kinds=positions, max_layers=max_layers))
    if shape != "encoder":
        decoder = draw(stacks(causal=True, cross_attention=shape == "both", kinds=positions, max_layers=max_layers))
    rate = st.sampled_from([0.0, 0.1, 0.5]) if dropout else st.just(0.0)
    d_embed = draw(st.none() | st.integers(2, 10))
    return Architecture(
        d_model=d_model,
        embedding=Embedding(
            vocab_size=draw(st.integers(8, 59)),
            d_embed=d_embed,
            projection_bias=d_embed is not None and draw(st.booleans()),
            token_types=draw(st.sampled_from([0, 0, 2])),
            scaled=draw(st.booleans()),
        ),
        encoder=encoder,
        decoder=decoder,
        head=draw(heads(language=language)),
        tokens=Tokens(pad=PAD, bos=BOS, eos=(EOS,), decoder_start=PAD if shape == "both" else None, mask=MASK),
        dropout=Dropout(**{name: draw(rate) for name in Dropout.field_names()}),
        initialisation=draw(
            st.builds(
                Initialisation,
                kind=st.sampled_from(["normal", "fan_in"]),
                std=st.sampled_from([0.02, 0.1]),
                scaled_residual=st.booleans(),
            )
        ),
    )
