"""The fused kernels on a GPU against the reference in float64: python -m pytest tests/gpu -q"""

import random

import pytest
import torch

from spattn_olmoe import attention
from spattn_olmoe.kernels import Facts, cached_attention, choose
from spattn_olmoe.patterns import available_variants, find_variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("error:flex_attention called without torch.compile"),  # which a CPU may do
]

MASKS = [name for name in available_variants() if find_variant(name).build(4, 32).intervals is not None]
LENGTHS = [1, 2, 17, 63, 64, 65, 127, 128, 129, 255, 1000, 1024, 2047, 2048, 4096, 4097]
SHAPES = [
    *((1, 1, 64), (2, 1, 32), (3, 3, 80), (2, 2, 192), (4, 4, 128), (4, 1, 256)),
    *((8, 8, 128), (8, 2, 64), (16, 16, 64), (16, 4, 96), (32, 32, 128), (32, 8, 128)),
]
"""Query heads, key heads, head_dim. A few, because each is compiled for every dtype, with documents and without."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest error of an output or gradient as a share of its largest entry."""


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is full of NaN: what a kernel forgets to write shows."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def build(name, H, N):
    return find_variant(name).build(H, N)


def tensors(B, T, H, G, D, dtype=torch.bfloat16):
    return [torch.randn(B, T, h, D, dtype=dtype, device="cuda", requires_grad=True) for h in (H, G, G)]


def documents(rng, total):
    if rng.random() < 0.5:
        return None
    cuts = sorted(rng.choices(range(total + 1), k=rng.choice([1, 3, 9])))  # empty documents among them
    return torch.tensor([0, *cuts, total], dtype=torch.int32, device="cuda")


def with_gradients(call, xs, d_out):
    out = call(*xs)
    return out, *torch.autograd.grad(out, xs, d_out.to(out.dtype))


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (a.double() - e.double()).abs().max().item()
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"{name} is off by {error:.2e}"


@pytest.mark.parametrize("G", [8, 2])
@pytest.mark.parametrize("name", available_variants())
def test_gate(name, G):
    """Every mask once, in the dtype and head_dim that benchmarks measure: what benchmark.py gpu begins with."""
    T = 1024
    pattern = build(name, 8, T)
    xs, d_out = tensors(2, T, 8, G, 128), torch.randn(2, T, 8, 128, device="cuda", dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in xs]
    if (
        pattern.follows_content
    ):  # its mask is that of the rounded queries and keys, and near ties of buckets are no error
        exact = [x.detach().clone().requires_grad_() for x in xs]
    expected = with_gradients(lambda *x: attention(*x, pattern, "reference"), exact, d_out)
    assert_close(with_gradients(lambda *x: attention(*x, pattern), xs, d_out), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("draw", range(4), ids="draw{}".format)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_agrees_with_the_reference(name, T, draw):
    rng = random.Random(f"{name} {T} {draw}")
    H, G, D = rng.choice(SHAPES if T <= 2048 else SHAPES[:8])  # the reference holds (H, T, T) in float64
    B = rng.choice([1, 2, 3]) if T <= 1024 else 1
    N = max(H, rng.choice([T, 2 * T, T // 2, 1024]))
    dtype = list(TOLERANCE)[draw % 3]
    cu_doc_lens = documents(rng, B * T)
    pattern = build(name, H, N)
    xs = tensors(B, T, H, G, D, dtype)
    d_out = torch.randn(B, T, H, D, device="cuda", dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in xs]
    expected = with_gradients(lambda *x: attention(*x, pattern, "reference", cu_doc_lens), exact, d_out)
    actual = with_gradients(lambda *x: attention(*x, pattern, "triton", cu_doc_lens), xs, d_out)
    assert_close(actual, expected, TOLERANCE[dtype])
    assert (actual[0][(expected[0] == 0).all(-1)] == 0).all()


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("T", [200, 1024])
@pytest.mark.parametrize("name", [name for name in available_variants() if name not in MASKS])
def test_masks_without_intervals_through_flex_agree_with_the_reference(name, T, with_documents):
    pattern = build(name, 8, 1024)
    cu_doc_lens = torch.tensor([0, 50, 290, 2 * T], dtype=torch.int32, device="cuda") if with_documents else None
    xs, d_out = tensors(2, T, 8, 2, 64, torch.float32), torch.randn(2, T, 8, 64, device="cuda")
    assert choose(Facts("cuda", pattern, T, with_documents)) == "flex"
    expected = with_gradients(lambda *x: attention(*x, pattern, "reference", cu_doc_lens), xs, d_out)
    assert_close(with_gradients(lambda *x: attention(*x, pattern, "auto", cu_doc_lens), xs, d_out), expected, 1e-3)


@pytest.mark.parametrize("name", MASKS)
def test_head_offset_and_scale(name):
    pattern = build(name, 8, 500)
    xs, d_out = tensors(2, 500, 4, 2, 64), torch.randn(2, 500, 4, 64, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in xs]
    options = {"scale": -0.2, "head_offset": 4}
    expected = with_gradients(lambda *x: attention(*x, pattern, "reference", **options), exact, d_out)
    assert_close(with_gradients(lambda *x: attention(*x, pattern, "triton", **options), xs, d_out), expected, 2e-2)


def test_gradients_are_the_same_bits_every_time():
    pattern = build("sharing", 8, 2048)
    xs, d_out = tensors(2, 2048, 8, 2, 128), torch.randn(2, 2048, 8, 128, device="cuda")
    first, second = (with_gradients(lambda *x: attention(*x, pattern, "triton"), xs, d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_to_one_graph():
    pattern = build("sharing", 8, 512)
    xs, d_out = tensors(2, 512, 8, 8, 64), torch.randn(2, 512, 8, 64, device="cuda")
    cu_doc_lens = torch.tensor([0, 100, 700, 1024], dtype=torch.int32, device="cuda")

    def call(q, k, v):
        return attention(q, k, v, pattern, cu_doc_lens=cu_doc_lens).sin()

    assert_close(with_gradients(torch.compile(call, fullgraph=True), xs, d_out), with_gradients(call, xs, d_out), 1e-2)


@pytest.mark.parametrize("name", MASKS[1:])
def test_auto_chooses_the_kernels_on_a_gpu_that_can_run_them(name):
    expected = "triton" if torch.cuda.get_device_capability() >= (8, 0) else "flex"
    assert choose(Facts("cuda", build(name, 8, 1024), 1024)) == expected


def test_offsets_beyond_two_to_the_31_and_memory_that_grows_with_the_length_only():
    """131,072 tokens of a fused projection, so that positions times strides pass 2^31 elements."""
    T, H, D = 131072, 2, 64
    pattern = build("exclusive", 16, T)
    wide = torch.empty(1, T, 16400 + 3 * H * D, device="cuda", dtype=torch.bfloat16)
    wide[..., 16400:].normal_()
    q, k, v = (x.view(1, T, H, D) for x in wide[..., 16400:].split(H * D, dim=-1))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(q, k, v, pattern, "triton", head_offset=14)
    assert torch.cuda.max_memory_allocated() - before < 4 * out.numel() * out.element_size()
    tail = slice(T - 64, T)  # queries whose keys are the band lo .. hi
    for h in range(H):
        lo, hi = pattern.head_intervals(14 + h)[0]
        scores = q[0, tail, h].double() @ k[0, :, h].double().T * D**-0.5
        d = torch.arange(T, device="cuda")[tail, None] - torch.arange(T, device="cuda")
        expected = scores.masked_fill((d < lo) | (d >= hi), float("-inf")).softmax(-1) @ v[0, :, h].double()
        torch.testing.assert_close(out[0, tail, h].double(), expected, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", MASKS)
def test_decoding(name, dtype):
    pattern = build(name, 8, 4096)
    q, k, v = (torch.randn(3, s, h, 128, device="cuda", dtype=dtype) for s, h in ((1, 8), (4096, 2), (4096, 2)))
    start = torch.tensor([4095, 17, 2000], device="cuda")
    options = {"start": start, "leftpad": torch.tensor([0, 3, 1999], device="cuda")}
    expected = cached_attention(q.double(), k.double(), v.double(), pattern, impl="sdpa", **options)
    cached_attention(q, k, v, pattern, **options)  # compiles, and moves the table of intervals
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = cached_attention(q, k, v, pattern, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = (actual.double() - expected).abs().max().item()
    assert error <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
