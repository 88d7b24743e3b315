"""Reachability against a search for paths, one pair of positions at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spattn_olmoe import build_pattern
from spattn_olmoe.paper.reachability import reach
from spattn_olmoe.patterns import available_variants, find_variant

MASKS = [name for name in available_variants() if not find_variant(name).build(4, 16).follows_content]


def search(masks, T):
    """Fewest hops and number of paths between all pairs, by walking: an independent definition."""
    hops, paths = torch.zeros(T, T), torch.zeros(T, T, dtype=torch.float64)
    for source in range(T):
        ways = {(source, 0): 1}  # (position, hops so far) -> number of ways
        for mask in masks:
            after = dict(ways)
            for (place, hop), number in ways.items():
                for query in range(T):
                    heads = int(mask[:, query, place].sum())
                    if heads:
                        after[query, hop + 1] = after.get((query, hop + 1), 0) + number * heads
            ways = after
        for query in range(T):
            found = {hop: number for (place, hop), number in ways.items() if place == query}
            hops[query, source] = min(found) if found else torch.inf
            paths[query, source] = sum(found.values())
    return hops, paths


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(MASKS), min_size=1, max_size=3), st.integers(1, 4), st.integers(5, 14))
def test_against_a_search(masks, H, T):
    layers = [find_variant(name).build(H, T) for name in masks]
    found = reach(layers, T)
    hops, paths = search([layer.dense_mask(T) for layer in layers], T)
    for d in range(T):
        there, ways = hops.diagonal(-d), paths.diagonal(-d)
        assert found.share[d] == pytest.approx(float(there.isfinite().double().mean()))
        assert found.hops[d] == (int(there.max()) if there.isfinite().all() else 0)
        assert found.paths[d] == pytest.approx(float(ways.mean()))


def test_exclusive_bands_reach_every_distance_in_one_layer_by_one_head():
    found = reach([build_pattern("spattention", n_heads=8, band_length=64)], 64)
    assert found.hops.tolist() == [0] + [1] * 63 and found.paths.tolist() == [2.0] + [1.0] * 63


def test_a_window_reaches_as_far_as_its_layers_carry():
    pattern = build_pattern("sliding_window", n_heads=8, band_length=64)  # d <= 8
    found = reach([pattern] * 3, 64)
    assert found.hops.tolist() == [0] + [-(-d // 8) for d in range(1, 25)] + [0] * 39
    bands = found.bands(8)
    assert [band["hops"] for band in bands] == [1, 2, 3, 0, 0, 0, 0, 0]
    assert bands[0]["share"] == 1 and bands[7]["share"] == 0 and bands[7]["paths"] == 0


def test_what_has_no_mask_of_its_own_is_refused():
    pattern = build_pattern("reformer", n_heads=2, band_length=16, buckets="lsh")
    with pytest.raises(ValueError, match="depends on queries and keys"):
        reach([pattern], 16)
    with pytest.raises(ValueError, match="at least one layer"):
        reach([], 16)
