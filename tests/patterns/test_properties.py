"""What the paper promises of the masks (Eq. 5, Eq. 8, balance), on shapes that hypothesis chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_oracle import MASKS, WITH_INTERVALS, build

from spattn_olmoe.patterns import UNBOUNDED, build_pattern

on_many_shapes = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def heads_and_lengths(draw):
    H = draw(st.integers(1, 13))
    N = draw(st.integers(H, 90))
    return H, N, draw(st.integers(1, 120))


def contains(big, small):
    return not (small & ~big).any()


@on_many_shapes
@given(heads_and_lengths())
def test_completeness(shape):
    """Eq. 5: the heads together attend every causal pair."""
    H, N, _ = shape
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    for mask in ("exclusive", "sharing", "eball"):
        assert torch.equal(build(mask, H, N).dense_mask().any(0), causal)


@on_many_shapes
@given(heads_and_lengths())
def test_completeness_ends_at_the_band_length(shape):
    """A longer input than in training has distances that no head attends; a shorter one has none."""
    H, N, T = shape
    distance = torch.arange(T)[:, None] - torch.arange(T)
    assert torch.equal(build("eball", H, N).dense_mask(T).any(0), (distance >= 0) & (distance < N))


@on_many_shapes
@given(heads_and_lengths())
def test_exclusivity(shape):
    """Eq. 8: no key of a query belongs to two heads."""
    H, N, T = shape
    for mask in ("exclusive", "eball", "gbhalf"):
        assert build(mask, H, N).dense_mask(T).sum(0).max() <= 1


@on_many_shapes
@given(heads_and_lengths())
def test_balance(shape):
    """Band widths differ by at most one token, and the wider ones come first."""
    H, N, _ = shape
    widths = build("eball", H, N).mask_rows(N - 1, N, N).sum(-1).flatten().tolist()
    assert sum(widths) == N
    assert max(widths) - min(widths) <= 1
    assert widths == sorted(widths, reverse=True)


@on_many_shapes
@given(heads_and_lengths())
def test_ablations_are_parts_of_bands_with_sharing(shape):
    H, N, T = shape
    whole = build("sharing", H, N).dense_mask(T)
    bands, halves, window = (build(mask, H, N).dense_mask(T) for mask in ("eball", "gbhalf", "sliding_window"))
    assert contains(whole, bands)
    assert contains(bands, halves)
    assert contains(whole, window)
    assert torch.equal(whole, bands | window)


@on_many_shapes
@given(heads_and_lengths())
def test_exclusive_bands_are_eball(shape):
    H, N, T = shape
    bands, eball = build("exclusive", H, N), build("eball", H, N)
    assert torch.equal(bands.dense_mask(T), eball.dense_mask(T))
    assert torch.equal(bands.intervals, eball.intervals)
    assert bands != eball


@on_many_shapes
@given(heads_and_lengths(), st.sampled_from(sorted(MASKS)))
def test_nothing_is_acausal(shape, mask):
    H, N, T = shape
    assert not build(mask, H, N).dense_mask(T).triu(1).any()


@on_many_shapes
@given(heads_and_lengths(), st.sampled_from(sorted(MASKS)))
def test_counts_are_those_of_the_mask(shape, mask):
    H, N, T = shape
    pattern = build(mask, H, N)
    dense = pattern.dense_mask(T)
    assert pattern.attended_pairs(T) == int(dense.sum())
    assert pattern.dead_rows(T) == int((~dense.any(-1)).sum())


@on_many_shapes
@given(heads_and_lengths(), st.sampled_from(WITH_INTERVALS))
def test_intervals_are_the_mask(shape, mask):
    H, N, T = shape
    pattern = build(mask, H, N)
    assert pattern.intervals.dtype == torch.int32
    assert pattern.intervals.shape == (H, 2, 2)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    lo, hi = pattern.intervals[:, :, 0, None, None], pattern.intervals[:, :, 1, None, None]
    assert torch.equal(pattern.dense_mask(T), ((lo <= distance) & (distance < hi)).any(1))


@on_many_shapes
@given(heads_and_lengths(), st.sampled_from(WITH_INTERVALS))
def test_intervals_are_disjoint_ascending_and_empty_as_zeros(shape, mask):
    H, N, _ = shape
    for (lo, hi), (lo2, hi2) in build(mask, H, N).intervals.tolist():
        assert 0 <= lo < hi <= UNBOUNDED or (lo, hi) == (0, 0)
        if (lo2, hi2) != (0, 0):
            assert 0 < hi < lo2 < hi2 <= UNBOUNDED  # hi < lo2: neighbours are one interval


def test_half_of_a_band_of_one_token_is_empty():
    assert build("gbhalf", 4, 4).intervals.tolist() == [[[0, 0], [0, 0]]] * 4


@pytest.mark.parametrize("asked", ["intervals", "mask"])
def test_a_compiled_graph_is_not_reused_for_another_mask_of_the_type(asked):
    """The intervals are constants of a graph, so all options are among what a graph is chosen by."""

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(pattern, h, i, j):
        if asked == "mask":
            return pattern.mask_mod(h, h, i, j)
        return torch.stack([i[0, 0] * 0 + end for head in pattern.table for pair in head for end in pair])

    h, i, j = torch.arange(4)[:, None, None], torch.arange(20)[:, None], torch.arange(20)
    for options in ({}, {"local_sharing": True}, {"head_order": (3, 1, 2, 0)}, {"head_order": (1, 3, 2, 0)}):
        pattern = build_pattern("spattention", 4, 20, **options)
        expected = pattern.dense_mask(20) if asked == "mask" else pattern.intervals.flatten().long()
        assert torch.equal(compiled(pattern, h, i, j), expected), options
