"""Every mask against its definition, pair by pair."""

import random

import pytest
import torch
from mask_oracle import DEFINED, MASKS, WITH_INTERVALS, allowed, allowed_keys, build
from torch.nn.attention.flex_attention import create_mask

from spattn_olmoe.patterns import VARIANTS, Pattern, build_pattern

#         H, N, T
SHAPES = [
    (1, 1, 1),
    (1, 7, 7),
    (2, 2, 2),
    (2, 3, 3),
    (3, 4, 9),  # N <= 4: the stand-ins are plain causal
    (4, 4, 4),
    (2, 5, 5),
    (5, 5, 12),  # bands one token wide
    (3, 8, 8),
    (3, 16, 16),
    (4, 16, 9),  # T < N
    (4, 16, 27),  # T > N
    (5, 17, 17),  # N not divisible by H
    (7, 24, 30),
    (6, 29, 20),
    (8, 40, 40),
    (2, 64, 40),
]


def keys_of(dense: torch.Tensor) -> list[list[set[int]]]:
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in dense]


def test_every_mask_of_the_package_has_a_definition_here():
    assert {name for name in VARIANTS if name in MASKS} == set(DEFINED)


@pytest.mark.parametrize(("H", "N", "T"), SHAPES)
@pytest.mark.parametrize("mask", DEFINED)
def test_mask_counts_and_intervals_agree_with_the_definition(mask, H, N, T):
    pattern = build(mask, H, N)
    keys = allowed_keys(mask, H, N, T)

    dense = pattern.dense_mask(T)
    assert dense.dtype == torch.bool
    assert dense.shape == (H, T, T)
    assert keys_of(dense) == keys
    assert pattern.attended_pairs(T) == sum(len(row) for head in keys for row in head)
    assert pattern.dead_rows(T) == sum(not row for head in keys for row in head)

    if mask in WITH_INTERVALS:
        for h, (first, second) in enumerate(pattern.intervals.tolist()):
            distances = {*range(*(min(x, T) for x in first)), *range(*(min(x, T) for x in second))}
            assert distances == {i - j for i in range(T) for j in keys[h][i]}
    else:
        assert pattern.intervals is None


@pytest.mark.parametrize(("H", "N", "T"), [(8, 24, 24), (5, 32, 7), (5, 32, 3), (3, 16, 40), (4, 64, 4), (2, 9, 5)])
@pytest.mark.parametrize("mask", DEFINED)
def test_band_length_input_makes_bands_of_the_input(mask, H, N, T):
    """T smaller than H is no error here: heads beyond T have nothing to attend."""
    pattern = build(mask, H, N, follows_input=True)
    keys = allowed_keys(mask, H, T, T)
    assert keys_of(pattern.dense_mask(T)) == keys
    assert pattern.attended_pairs(T) == sum(len(row) for head in keys for row in head)
    assert pattern.dead_rows(T) == sum(not row for head in keys for row in head)


@pytest.mark.parametrize(("H", "N", "T"), [(8, 1024, 1024), (16, 4096, 4096), (12, 1000, 1500), (3, 300, 2000)])
@pytest.mark.parametrize("mask", DEFINED)
def test_large_masks_agree_with_the_definition_on_random_pairs(mask, H, N, T):
    """Sizes at which windows, global tokens, strides and buckets have reached their limits."""
    rng = random.Random(f"{mask} {N}")
    pairs = [(rng.randrange(H), i := rng.randrange(T), rng.randrange(i + 1)) for _ in range(300)]
    pairs += [(rng.randrange(H), rng.randrange(T), rng.randrange(T)) for _ in range(50)]  # half of them acausal
    pairs += [(rng.randrange(H), i := rng.randrange(20, T), max(0, i - rng.randrange(20))) for _ in range(100)]
    pairs += [(rng.randrange(H), rng.randrange(T), rng.randrange(20)) for _ in range(100)]
    pattern = build(mask, H, N)
    h, i, j = (torch.tensor(x) for x in zip(*pairs, strict=True))
    got = pattern.mask_mod(torch.zeros_like(h), h, i, j)
    assert got.dtype == torch.bool
    assert got.tolist() == [allowed(mask, H, N, *pair) for pair in pairs]


@pytest.mark.parametrize(("N", "T"), [(1024, 1024), (1024, 700), (640, 1100), (100, 999)])
@pytest.mark.parametrize("mask", MASKS)
def test_closed_forms_count_what_the_mask_allows(mask, N, T):
    pattern = build(mask, 3, N)
    dense = pattern.dense_mask(T)
    assert pattern.attended_pairs(T) == int(dense.sum())
    assert pattern.dead_rows(T) == int((~dense.any(-1)).sum())


def test_pytorch_takes_the_mask_mod_as_it_is():
    """FlexAttention counts the arguments of a function to tell a mask from a score; a bound method has one more."""
    pattern = build("exclusive", 4, 30)
    assert torch.equal(create_mask(pattern.mask_mod, None, 4, 33, 33, device="cpu")[0], pattern.dense_mask(33))


@pytest.mark.parametrize("mask", MASKS)
def test_mask_rows_are_rows_of_the_dense_mask(mask):
    pattern = build(mask, 4, 30)
    assert torch.equal(pattern.mask_rows(5, 19, 33), pattern.dense_mask(33)[:, 5:19])


@pytest.mark.parametrize("mask", MASKS)
def test_length_defaults_to_the_band_length(mask):
    pattern = build(mask, 4, 30)
    assert torch.equal(pattern.dense_mask(), pattern.dense_mask(30))
    assert pattern.attended_pairs() == pattern.attended_pairs(30)
    assert pattern.dead_rows() == pattern.dead_rows(30)


@pytest.mark.parametrize("mask", dict.fromkeys((*DEFINED, *WITH_INTERVALS)))
def test_counting_a_long_input_builds_no_mask(mask, monkeypatch):
    def too_big(*args, **kwargs):
        raise AssertionError("a mask of 131072 x 131072 was asked for")

    monkeypatch.setattr(Pattern, "dense_mask", too_big)
    monkeypatch.setattr(Pattern, "mask_rows", too_big)
    N = 131072
    pairs = build(mask, 16, N).attended_pairs()
    one_dense_head = N * (N + 1) // 2
    assert 0 < pairs <= 16 * one_dense_head
    if mask == "dense":
        assert pairs == 16 * one_dense_head
    if mask in ("exclusive", "eball"):  # Eq. 7: all heads together do the work of one dense head
        assert pairs == one_dense_head


@pytest.mark.parametrize("mask", DEFINED)
def test_dead_rows_of_a_long_input_build_no_mask(mask, monkeypatch):
    monkeypatch.setattr(Pattern, "dense_mask", lambda *args, **kwargs: pytest.fail("a dense mask was asked for"))
    monkeypatch.setattr(Pattern, "mask_rows", lambda *args, **kwargs: pytest.fail("mask rows were asked for"))
    N, H = 131072, 16
    starts_of_bands = sum(h * (N // H) for h in range(H))
    expected = starts_of_bands if mask in ("exclusive", "eball", "gbhalf") else 0
    if mask == "equal_area":  # each edge is the whole number nearest to where the share of the pairs is due
        assert abs(build(mask, H, N).dead_rows() - sum(N * (1 - (1 - h / H) ** 0.5) for h in range(H))) < H
        return
    assert build(mask, H, N).dead_rows() == expected


def test_bands_of_equal_area_have_as_many_pairs_and_cover_every_distance():
    for N, H, sharing in ((1024, 8, False), (4096, 16, True), (131072, 16, False)):
        pattern = build_pattern("equal_area", H, N, local_sharing=sharing)
        pairs = pattern.attended_pairs_per_head()
        assert max(pairs) - min(pairs) <= N  # one distance occurs at most N times
        edges = sorted(interval for head in pattern.intervals.tolist() for interval in head if interval != [0, 0])
        assert edges[0][0] == 0 and max(hi for _, hi in edges) == N
        assert sum(hi - lo for head in pattern.intervals.tolist() for lo, hi in head) >= N


@pytest.mark.parametrize(("H", "N"), [(2, 5), (8, 24), (5, 129), (8, 1024)])
def test_the_released_reformer_stand_in_depends_on_distance_only_and_is_the_same_in_every_head(H, N):
    """Its hash is linear in the position, so two buckets differ by 3 d mod nb, whatever the head."""
    dense = build("reformer", H, N).dense_mask()
    assert (dense == dense[0]).all()
    by_distance = dense[0, -1].flip(0)  # the last row holds every distance
    i, j = torch.tril_indices(N, N)
    assert torch.equal(dense[0, i, j], by_distance[i - j])


def test_longformer_and_bigbird_do_not_depend_on_the_head_but_on_more_than_the_distance():
    for mask in ("longformer", "bigbird"):
        dense = build(mask, 3, 200).dense_mask()
        assert (dense == dense[0]).all()
        assert any(dense[0].diagonal(-d).unique().numel() == 2 for d in range(200)), mask
