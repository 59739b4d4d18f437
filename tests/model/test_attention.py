"""The fused attention and the written-out one are the same function."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.architecture import Positions, RotaryScaling
from lathe.model.attention import attend, attend_reference, attend_shared
from lathe.model.mask import Mask, cached_mask, self_mask
from lathe.model.positions import bucket, rotate, rotation


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    queries=st.integers(1, 6),
    extra=st.integers(0, 4),
    masked=st.sampled_from(["none", "causal", "padding", "segments", "window", "cache"]),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 0.35]),
    seed=st.integers(0, 99),
)
def test_fused_equals_reference(batch, groups, per_group, queries, extra, masked, biased, scale, seed):
    keys = queries if masked in ("causal", "padding", "segments", "window") else queries + extra
    heads = groups * per_group
    q = draw(batch, heads, queries, 4, seed=seed)
    k, v = draw(batch, groups, keys, 4, seed=seed + 1), draw(batch, groups, keys, 4, seed=seed + 2)
    bias = draw(1, heads, queries, keys, seed=seed + 3) if biased else None
    mask = make_mask(masked, batch, queries, keys, seed)
    fused = attend(q, k, v, mask, bias_BHTS=bias, scale=scale)
    written, weights = attend_reference(q, k, v, mask, bias_BHTS=bias, scale=scale)
    torch.testing.assert_close(fused, written, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch, heads, queries))


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    queries=st.integers(1, 3),
    shared=st.integers(1, 4),
    own=st.integers(0, 3),
    window=st.sampled_from([None, 2]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_keys_that_all_rows_share_may_be_held_once(
    batch, groups, per_group, queries, shared, own, window, biased, seed
):
    heads, keys = groups * per_group, shared + own + queries
    q = draw(batch, heads, queries, 4, seed=seed)
    first = draw(1, groups, shared, 4, seed=seed + 1), draw(1, groups, shared, 4, seed=seed + 2)
    k, v = (draw(batch, groups, own + queries, 4, seed=seed + more) for more in (3, 4))
    bias = draw(1, heads, queries, keys, seed=seed + 5) if biased else None
    # Rows stand at different places.
    places = shared + torch.arange(batch)[:, None] % (own + 1) + torch.arange(queries)
    mask = cached_mask(places, keys, window=window)
    found, weights = attend_shared(q, first, k, v, mask, bias_BHTS=bias, scale=0.7)
    whole_k, whole_v = (torch.cat((each.expand(batch, -1, -1, -1), rest), dim=2) for each, rest in zip(first, (k, v)))
    expected, theirs = attend_reference(q, whole_k, whole_v, mask, bias_BHTS=bias, scale=0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights, theirs)


def make_mask(kind: str, batch: int, queries: int, keys: int, seed: int) -> Mask:
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    if kind == "causal":
        return self_mask(causal=True, length=queries, device=cpu)
    if kind == "padding":
        padding = torch.randint(0, 2, (batch, queries), generator=generator)
        padding[:, -1] = 1
        return self_mask(causal=False, padding_BT=padding, length=queries, device=cpu)
    if kind == "segments":
        segments = torch.randint(0, 2, (batch, queries), generator=generator).sort(dim=1).values
        return self_mask(causal=True, segments_BT=segments, length=queries, device=cpu)
    if kind == "window":
        return self_mask(causal=True, window=2, length=queries, device=cpu)
    if kind == "cache":
        return cached_mask(torch.arange(keys - queries, keys).expand(batch, -1), keys, window=3)
    return Mask()


def test_a_masked_key_has_no_weight_and_its_value_no_effect():
    q, k, v = (draw(1, 1, 3, 4, seed=i) for i in range(3))
    mask = self_mask(causal=False, padding_BT=torch.tensor([[1, 1, 0]]), length=3, device=torch.device("cpu"))
    other = v.clone()
    other[:, :, 2] = 1e6
    _, weights = attend_reference(q, k, v, mask, scale=1.0)
    assert weights[0, 0, :2, 2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(
        attend(q, k, v, mask, scale=1.0)[:, :, :2], attend(q, k, other, mask, scale=1.0)[:, :, :2]
    )


def test_a_query_that_sees_nothing_gets_a_finite_answer():
    q, k, v = (draw(1, 1, 2, 4, seed=i) for i in range(3))
    nothing = Mask(torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    assert attend(q, k, v, nothing, scale=1.0).isfinite().all()
    assert attend_reference(q, k, v, nothing, scale=1.0)[0].isfinite().all()


def test_scores_by_hand():
    # One query (1, 0), keys (1, 0) and (0, 1), scale 1: softmax(1, 0) = (0.7311, 0.2689).
    q = torch.tensor([[[[1.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    v = torch.tensor([[[[10.0, 0.0], [0.0, 20.0]]]])
    out, weights = attend_reference(q, k, v, Mask(), scale=1.0)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.731059, 0.268941]))
    torch.testing.assert_close(out.flatten(), torch.tensor([7.31059, 5.37883]))


@given(shift=st.integers(0, 40), first=st.integers(0, 20), second=st.integers(0, 20))
def test_rotary_products_depend_on_the_distance_alone(shift, first, second):
    spec = Positions(kind="rotary", max_positions=64)
    q, k = draw(1, 1, 1, 8, seed=1), draw(1, 1, 1, 8, seed=2)

    def product(at_q: int, at_k: int) -> float:
        turned_q = rotate(q, rotation(torch.tensor([[at_q]]), spec, 8))
        turned_k = rotate(k, rotation(torch.tensor([[at_k]]), spec, 8))
        return float((turned_q * turned_k).sum())

    assert abs(product(first, second) - product(first + shift, second + shift)) < 1e-4


def test_llama3_scaling_keeps_fast_frequencies_and_slows_slow_ones():
    plain = Positions(kind="rotary", max_positions=64, theta=500000.0)
    scaling = RotaryScaling(kind="llama3", factor=8.0, original_max_positions=8192)
    scaled = Positions(kind="rotary", max_positions=64, theta=500000.0, scaling=scaling)
    at = torch.tensor([[1]])
    angle = [rotation(at, spec, 128)[0].acos()[0, 0, 0, :64] for spec in (plain, scaled)]
    torch.testing.assert_close(angle[1][0], angle[0][0])  # wavelength 2π: kept
    turns = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(turns[-1] / 8, turns[-1] * 0.125)
    sin = [rotation(at, spec, 128)[1][0, 0, 0, 63] for spec in (plain, scaled)]
    torch.testing.assert_close(sin[1] * 8, sin[0], rtol=1e-4, atol=0)  # wavelength beyond 8192: divided by 8


def test_relative_buckets_are_exact_near_and_logarithmic_far():
    spec = Positions(kind="relative", n_buckets=32, max_distance=128)
    both = bucket(torch.tensor([0, -1, 1, -7, 7, -200, 200]), spec, causal=False)
    assert both.tolist() == [0, 1, 17, 7, 23, 15, 31]
    past = bucket(torch.tensor([0, -1, -15, -16, -500, 3]), spec, causal=True)
    assert past.tolist() == [0, 1, 15, 16, 31, 0]
