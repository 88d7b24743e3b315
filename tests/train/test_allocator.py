"""Freed memory is used again, without asking the system for it."""

import platform
import subprocess
import sys

import pytest

from benchmarks.forked import environment

CODE = """
import resource, sys, torch
from spattn_olmoe.train.allocator import keep_freed_memory

def step():
    kept = [torch.ones(10 * 2**20) for _ in range(3)]  # 40 MiB each: from 32 on glibc asks the system, whatever it has learnt

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print("RESULT", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_faults_no_page_that_the_one_before_has_freed():
    faults = {}
    for which in ("stock", "kept"):  # each in a Python of its own: a fork would have its parent's heap
        command = [sys.executable, "-c", CODE, which]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
        faults[which] = int(done.stdout.split("RESULT")[1])
    assert faults["stock"] > 10_000, "glibc keeps freed memory by itself: the setting can go"
    assert faults["kept"] < faults["stock"] / 4  # and not zero: the system may take a huge page apart, 512 faults
