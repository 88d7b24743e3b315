"""What ``auto`` takes on a GPU, and how the fused kernels are refused where they cannot run. No GPU, no Triton needed."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import build

from spattn_olmoe import attention
from spattn_olmoe.kernels import Facts, choose, dispatch
from spattn_olmoe.kernels.dispatch import unsuitable


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("mask", "documents", "dtype", "head_dim", "impl"),
    [
        ("exclusive", False, torch.bfloat16, 128, "triton"),
        ("sharing", True, torch.float16, 80, "triton"),
        ("two_far_intervals", False, torch.float32, 256, "triton"),
        ("dense", True, torch.bfloat16, 128, "triton"),
        ("dense", False, torch.bfloat16, 128, "sdpa"),
        ("longformer", False, torch.bfloat16, 128, "flex"),
        ("bigbird", True, torch.bfloat16, 128, "flex"),
        ("exclusive", False, torch.bfloat16, 512, "flex"),
    ],
)
def test_auto_on_a_gpu(h200, mask, documents, dtype, head_dim, impl):
    pytest.importorskip("triton")
    assert choose(Facts("cuda", build(mask, 4, 256), 256, documents, dtype, head_dim)) == impl


def test_an_old_gpu_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: (7, 5))
    dispatch._triton_missing.cache_clear()
    try:
        facts = Facts("cuda", build("eball", 4, 256), 256)
        said = unsuitable("triton", facts)
        assert choose(facts) == "flex"
    finally:
        dispatch._triton_missing.cache_clear()
    assert said == "needs a GPU of compute capability 8.0 or later, not 7.5: use impl='flex'"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves the CPU")
def test_a_cpu_is_refused():
    pytest.importorskip("triton")
    q = torch.randn(1, 64, 4, 8)
    with pytest.raises(ValueError, match=r"attention\.impl='triton' needs a CUDA GPU, but q is on cpu"):
        attention(q, q, q, build("eball", 4, 64), impl="triton")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from spattn_olmoe import attention, build_pattern
from spattn_olmoe.kernels import cached_attention
q = torch.randn(1, 64, 4, 8)
pattern = build_pattern("spattention", n_heads=4, band_length=64)
attention(q, q, q, pattern)
cached_attention(q[:, -1:], q, q, pattern, start=63)
for call in (lambda: attention(q, q, q, pattern, impl="triton"),
             lambda: cached_attention(q[:, -1:], q, q, pattern, start=63, impl="triton")):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_all_but_the_kernels_works_without_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert len(said) == 2
    assert all("needs the package 'triton', which is not installed" in line for line in said)
