"""Reordered heads are the same masks in another order, and the balanced order shares their work out evenly."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from mask_oracle import MASKS, WITH_INTERVALS, build

from spattn_olmoe import attention, build_pattern
from spattn_olmoe.kernels.flex import block_mask
from spattn_olmoe.patterns.head_order import balanced_order, imbalance, rank_loads


@st.composite
def reordered(draw, masks=tuple(MASKS)):
    """A mask in the natural order, a permutation of its heads, and the length of an input."""
    H = draw(st.integers(1, 8))
    N = draw(st.integers(H, 40))
    order = draw(st.permutations(range(H)))
    return draw(st.sampled_from(masks)), H, N, order, draw(st.integers(1, 50))


@settings(max_examples=60, deadline=None)
@given(reordered(), st.booleans())
def test_a_reordered_pattern_is_the_natural_one_with_its_heads_in_that_order(case, follows_input):
    mask, H, N, order, T = case
    natural = build(mask, H, N, follows_input=follows_input)
    pattern = build(mask, H, N, follows_input=follows_input, head_order=order)
    assert torch.equal(pattern.dense_mask(T), natural.dense_mask(T)[order])
    assert pattern.attended_pairs_per_head(T) == tuple(pattern.dense_mask(T).sum((1, 2)).tolist())
    assert pattern.attended_pairs(T) == natural.attended_pairs(T)
    assert pattern.dead_rows(T) == natural.dead_rows(T)
    assert build_pattern(**pattern.to_config()) == pattern
    if mask in WITH_INTERVALS:
        table = natural.at_length(T).table
        assert pattern.at_length(T).table == tuple(table[h] for h in order)


@settings(max_examples=10, deadline=None)
@given(reordered(), st.data())
def test_every_implementation_follows_the_order(case, data):
    """Of a slice of the heads, as a rank holds them: outputs are the natural order's, permuted."""
    mask, H, N, order, T = case
    first = data.draw(st.integers(0, H - 1))
    heads = slice(first, data.draw(st.integers(first + 1, H)))
    pattern, natural = build(mask, H, N, head_order=order), build(mask, H, N)
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, T, H, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    undo = torch.tensor(order).argsort()
    expected = attention(q[:, :, undo], k[:, :, undo], v[:, :, undo], natural, impl="reference")[:, :, order]
    local = q[:, :, heads], k[:, :, heads], v[:, :, heads]
    for impl in ("reference", "cpu", "flex"):
        x = [part.float() for part in local] if impl == "flex" else local
        found = attention(*x, pattern, impl=impl, head_offset=first)
        torch.testing.assert_close(found.double(), expected[:, :, heads], atol=1e-5, rtol=1e-5)


def test_flex_attention_builds_the_blocks_of_reordered_heads():
    order = [2, 0, 3, 1]
    natural = build("eball", 4, 512).dense_mask()[order]
    blocks = block_mask(build("eball", 4, 512, head_order=order), 1, 512, 4, 0, torch.device("cpu"))
    held = natural.unfold(1, 128, 128).unfold(2, 128, 128).any(-1).any(-1)
    assert torch.equal(blocks.to_dense()[0].bool(), held)


def test_the_fused_kernels_are_handed_the_intervals_of_reordered_heads():
    """All that they learn of a pattern: ``lo, hi, lo, hi`` of each local head."""
    pytest.importorskip("triton")
    from spattn_olmoe.kernels.triton import local_intervals

    natural = build("sharing", 6, 60).intervals
    found = local_intervals(build("sharing", 6, 60, head_order=[5, 3, 1, 0, 2, 4]), 1, 4)
    assert found == natural[[3, 1, 0, 2]].flatten().tolist()


# ---- the balanced order ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5).flatmap(lambda e: st.lists(st.integers(0, 1000), min_size=2**e, max_size=2**e)))
def test_ranks_of_every_power_of_two_differ_by_no_more_than_heads_do(loads):
    order = balanced_order(loads)
    assert sorted(order) == list(range(len(loads)))
    degree = 1
    while degree <= len(loads):
        ranks = rank_loads([loads[h] for h in order], degree)
        assert max(ranks) - min(ranks) <= max(loads) - min(loads)
        degree *= 2


@pytest.mark.parametrize("H", [6, 9, 12, 24])
def test_other_numbers_of_heads_are_balanced_too(H):
    """At every degree that divides them, no worse than in the natural order, and better where that is uneven."""
    natural, balanced = build("eball", H, 1024), build("eball", H, 1024, head_order="balanced")
    for degree in (d for d in range(2, H) if H % d == 0):
        before, after = (imbalance(p.attended_pairs_per_head(), degree) for p in (natural, balanced))
        assert after < 1 + (before - 1) / 2


@pytest.mark.parametrize(("H", "N"), [(8, 1024), (16, 4096)])
@pytest.mark.parametrize("mask", ["exclusive", "sharing", "gbhalf"])
def test_the_papers_models_are_even_to_two_percent_where_a_rank_has_two_heads_or_more(mask, H, N):
    pattern = build(mask, H, N, head_order="balanced")
    for degree in (2, 4, 8):
        if degree < H:
            assert imbalance(pattern.attended_pairs_per_head(), degree) < 1.02
            assert imbalance(build(mask, H, N).attended_pairs_per_head(), degree) > 1.09


@pytest.mark.parametrize("mask", ["dense", "sliding_window", "longformer", "bigbird", "reformer"])
def test_heads_that_all_do_the_same_work_stay_in_order(mask):
    assert build(mask, 8, 64, head_order="balanced") == build(mask, 8, 64)


def test_a_balanced_pattern_is_the_permutation_that_it_was_made_with():
    pattern = build("eball", 8, 64, head_order="balanced", follows_input=True)
    assert pattern.head_order == (0, 7, 3, 4, 1, 6, 2, 5)
    assert pattern.at_length(12).head_order == pattern.head_order
    assert build("eball", 4, 16, head_order=[0, 1, 2, 3]) == build("eball", 4, 16)


@pytest.mark.parametrize(
    "order", [[0, 1], [0, 1, 1, 3], [0, 1, 2, 4], [True, 0, 2, 3], "sorted", 3, [0.0, 1, 2, 3], ["a"]]
)
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match=r"attention\.head_order=.*natural, balanced, or a list of the heads 0 to 3"):
        build("eball", 4, 16, head_order=order)
