"""The shipped configurations, compiled ahead of time for GPUs that are not here: they must keep their registers, and
their products must be asynchronous."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PLAIN = ["--dtype", "bf16"]
HALF = [*PLAIN, "--docs"]
RUNS = {  # capability, head_dims, and the rest of a command line; documents and groups cost the most registers
    "sm_90": [90, [64, 80, 128, 256], HALF],
    "sm_90 without documents": [90, [64, 128], PLAIN],
    "sm_90 grouped": [90, [64, 128], [*HALF, "--group", "4"]],
    "sm_90 float32": [90, [128], ["--dtype", "fp32", "--docs"]],
    "decoding": [90, [64, 128], [*HALF, "--kernel", "decode", "merge", "--group", "4"]],
    "sm_80": [80, [64, 128, 256], HALF],
    "sm_80 without documents": [80, [128], PLAIN],
    "sm_89": [89, [64, 128, 256], HALF],
    "sm_100": [100, [64, 128, 256], HALF],
    "sm_100 grouped": [100, [128], [*HALF, "--kernel", "dkdv", "--group", "4"]],
}


def compile_ahead_of_time(capability, head_dims, options):
    """The reports of one run of the compiler, in a process of its own: this one may have Triton's interpreter on."""
    dims = [str(d) for d in head_dims]
    command = [sys.executable, "scripts/benchmark.py", "compile_kernels", "--capability", str(capability)]
    run = subprocess.run(
        [*command, "--head-dim", *dims, *options],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("run", RUNS)
def test_shipped_configurations_do_not_spill_and_use_the_tensor_cores(run):
    from benchmarks.compile_kernels import SHARED_LIMIT

    capability, head_dims, options = RUNS[run]
    reports = compile_ahead_of_time(capability, head_dims, options)
    assert len(reports) >= len(head_dims)
    for report in reports:
        assert report["stack"] == report["local"] == 0, report
        assert not report["serialized"], report
        assert report["shared"] <= SHARED_LIMIT[capability], report
        if report["kernel"] in ("forward", "dq", "dkdv") and report["dtype"] == "bf16" and report["head_dim"] <= 128:
            tensor_core = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
            assert report[tensor_core] > 0, report


def test_configurations_that_spill_and_serialize_are_seen():
    """What the test above reads is there to be read."""
    options = [*HALF, "--kernel", "dkdv", "--config", "128", "64", "4", "2"]
    (report,) = compile_ahead_of_time(90, [128], options)
    assert report["stack"] > 0 and report["serialized"], report
    assert report["loop"] > 500
