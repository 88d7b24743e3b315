"""How the CPU path cuts its work: the result does not depend on it, and neither time nor memory grows with T squared."""

import dataclasses

import pytest
import torch
from attention_cases import Case, build, inputs

from spattn_olmoe import attention
from spattn_olmoe.kernels import cpu
from spattn_olmoe.kernels.strips import stacks

MASKS = ["exclusive", "sharing", "gbhalf", "two_far_intervals"]
CASES = [
    Case(T=300, N=300, H=6, G=3, B=3),
    Case(T=150, N=400, H=3, G=1, B=2, docs=(70, 30, 1, 120, 79)),
    Case(T=1100, N=2300, H=2, G=2, B=1, D=4),  # bands wider than 1024, and chunks of 128
]


def with_gradients(case, pattern, dtype=torch.float64, impl="cpu"):
    q, k, v, w = inputs(case, dtype)
    out = attention(q, k, v, pattern, impl, cu_doc_lens=case.cu_doc_lens)
    return out, *torch.autograd.grad((out * w).sum(), (q, k, v))


@pytest.mark.parametrize(
    "limits", [{"BLOCK": 1}, {"BLOCK": 5000}, {"STACKED": 1}, {"STACKED": 3000}, {"KEPT": 0}], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_the_result_does_not_depend_on_how_work_is_cut(monkeypatch, mask, case, limits):
    """Blocks, stacks, and whether probabilities are kept for the backward pass."""
    pattern = build(mask, case.H, case.N)
    expected = with_gradients(case, pattern, impl="reference")
    for name, value in limits.items():
        monkeypatch.setattr(cpu, name, value)
    for got, right in zip(with_gradients(case, pattern), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-11)


def test_as_many_scores_as_pairs_and_a_chunk_a_query():
    """At most one chunk more than the pairs for each query, whatever the length."""
    for mask in ("exclusive", "sharing", "sliding_window"):
        for N in (1024, 4096, 16384):
            pattern = build(mask, 8, N)
            plan = stacks(pattern.table, ((0, 1, 0, N),), torch.float32, block=2**17, tokens=2**14)
            assert pattern.attended_pairs(N) <= sum(stack.scores for stack in plan)
            chunk = max(stack.chunk for stack in plan)
            queries = sum(strips.size * strips.length for stack in plan for strips in stack.strips)
            assert sum(stack.scores for stack in plan) <= pattern.attended_pairs(N) + queries * (chunk + 1)


def test_what_is_kept_for_the_backward_pass_is_linear_in_the_length(monkeypatch):
    """Beyond ``KEPT`` scores: inputs, output and one number a query and head."""
    monkeypatch.setattr(cpu, "KEPT", 0)
    case = Case(T=512, N=512, H=4, B=1, D=16)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    q, k, v, _ = inputs(case, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention(q, k, v, build("sharing", case.H, case.N), "cpu")
    assert sum(kept) == 4 * q.numel() + case.T * case.H
    assert not any(out.grad_fn.kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_half_precision_is_rounded_once(mask, dtype):
    """Scores, softmax and sums are in float32: the output is that of float32, rounded."""
    case = dataclasses.replace(CASES[0], B=1)
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, dtype, requires_grad=False)
    exact = attention(q.float(), k.float(), v.float(), pattern, "cpu")
    assert torch.equal(attention(q, k, v, pattern, "cpu"), exact.to(dtype))


def test_large_scores_do_not_overflow():
    case = Case(T=200, N=200)
    pattern = build("sharing", case.H, case.N)
    q, k, v, w = inputs(case, torch.float32)
    out = attention(q * 100, k * 100, v, pattern, "cpu")
    expected = attention(q.double() * 100, k.double() * 100, v.double(), pattern, "reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad((out * w).sum(), (q, k, v)))


def test_a_plan_is_made_once():
    case = Case(T=128, N=128)
    pattern = build("exclusive", case.H, case.N)
    with_gradients(case, pattern)
    before = stacks.cache_info().misses
    with_gradients(case, pattern)
    assert stacks.cache_info().misses == before
