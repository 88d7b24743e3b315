"""Attention against a KV cache: the same rows as without one."""

import pytest
import torch
from attention_cases import CONTENT, MASKS, OWN, Case, build, inputs

from spattn_olmoe import attention
from spattn_olmoe.kernels import cached_attention

ALL = [*MASKS, *OWN, *CONTENT]


def through_cache(q, k, v, pattern, steps, capacity, as_tensor=False, **kwargs):
    """Outputs of all queries, fed in ``steps`` at a time; unwritten places of the cache hold rubbish."""
    B, T, G, D = k.shape
    keys, values = (torch.full((B, capacity, G, D), rubbish, dtype=k.dtype) for rubbish in (float("nan"), float("inf")))
    out, start = [], 0
    for step in steps:
        here = slice(start, start + step)
        keys[:, here], values[:, here] = k[:, here], v[:, here]
        at = torch.tensor(start) if as_tensor else start
        out.append(cached_attention(q[:, here], keys, values, pattern, start=at, **kwargs))
        start += step
    assert start == T
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("steps", [[1] * 30, [11, 1, 1, 7, 10], [30]], ids=["tokens", "chunks", "prompt"])
@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("mask", ALL)
def test_cached_rows_are_the_uncached_rows(mask, G, steps, as_tensor):
    case = Case(T=30, N=50, G=G)
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    got = through_cache(q, k, v, pattern, steps, capacity=34, as_tensor=as_tensor)
    torch.testing.assert_close(got, attention(q, k, v, pattern, "reference"), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("steps", [[1] * 24, [9, 1, 14]], ids=["tokens", "chunks"])
@pytest.mark.parametrize("mask", ALL)
def test_left_padded_sequences_are_attended_as_if_alone(mask, steps):
    case = Case(T=24, N=24, B=3, G=2)
    leftpad = torch.tensor([0, 5, 23])
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    for b, pad in enumerate(leftpad.tolist()):
        k[b, :pad] = v[b, :pad] = float("nan")
    got = through_cache(q, k, v, pattern, steps, capacity=24, leftpad=leftpad)
    for b, pad in enumerate(leftpad.tolist()):
        alone = attention(*(x[b : b + 1, pad:] for x in (q, k, v)), pattern, "reference")
        torch.testing.assert_close(got[b : b + 1, pad:], alone, rtol=1e-10, atol=1e-11)
        assert (got[b, :pad] == 0).all()


def test_rows_without_keys_are_exactly_zero():
    case = Case(T=16, N=16)
    pattern = build("eball", case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    got = through_cache(q, k, v, pattern, [1] * 16, capacity=16)
    for h in range(4):
        assert (got[:, : 4 * h, h] == 0).all()
        assert (got[:, 4 * h :, h] != 0).any(-1).all()


def test_local_heads_and_scale():
    case = Case(T=20, N=20, H=6, G=3, offset=2, local=2, scale=0.7)
    pattern = build("sharing", case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    got = through_cache(q, k, v, pattern, [5, 15], capacity=20, head_offset=2, scale=0.7)
    expected = attention(q, k, v, pattern, "reference", head_offset=2, scale=0.7)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_queries_behind_the_end_of_the_cache_are_refused():
    pattern = build("sharing", 4, 32)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 13, 2, 8)
    with pytest.raises(ValueError, match=r"start=12: 3 queries from there on do not fit a cache of 13 positions"):
        cached_attention(q, k, k, pattern, start=12)
    with pytest.raises(ValueError, match="start=-1"):
        cached_attention(q, k, k, pattern, start=-1)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_are_not_positive(scale):
    case = Case(T=12, N=12)
    pattern = build("standard", case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    got = through_cache(q, k, v, pattern, [5, 7], capacity=14, scale=scale)
    torch.testing.assert_close(got, attention(q, k, v, pattern, "reference", scale=scale), rtol=1e-10, atol=1e-11)


def test_a_cache_in_half_precision_serves_float32_queries():
    case = Case(T=12, N=12)
    pattern = build("sliding_window", case.H, case.N)
    q, k, v, _ = inputs(case, torch.float32, requires_grad=False)
    k, v = k.bfloat16(), v.bfloat16()
    got = cached_attention(q, k, v, pattern, start=0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, attention(q, k.float(), v.float(), pattern, "reference"))


def test_band_length_input_has_no_valid_cache():
    pattern = build("eball", 4, 20, follows_input=True)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"attention\.follows_input=true .*use_cache=false, or use follows_input"):
        cached_attention(q, q, q, pattern, start=0)
