"""The clock of a GPU, on a GPU that is played: what it times must have been queued before the GPU began."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402

CYCLES_PER_MS = 2e6


class GPU:
    """One queue: it sleeps from when the host says so, and then runs what was queued, at once or when it is queued."""

    def __init__(self):
        self.host = self.free_at = 0.0
        self.sleeps = []

    def sleep(self, cycles):
        self.sleeps.append(cycles)
        self.free_at = max(self.free_at, self.host) + cycles / CYCLES_PER_MS

    def launch(self, host_ms, gpu_ms):
        self.host += host_ms
        self.free_at = max(self.free_at, self.host) + gpu_ms

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free_at, self.gpu.host)

    def query(self):
        return self.gpu.host >= self.at

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    gpu = GPU()
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: torch.zeros(1))
    return gpu


@pytest.mark.parametrize(("launches", "host_ms", "sleeps"), [(3, 0.2, 1), (30, 0.2, 3), (3, 2.0, 3)])
def test_the_hosts_time_is_in_no_timing(gpu, launches, host_ms, sleeps):
    def call():
        for _ in range(launches):
            gpu.launch(host_ms, 0.01)

    assert timing._gpu_ms(call) == pytest.approx(launches * 0.01)
    assert len(gpu.sleeps) == sleeps and gpu.sleeps == sorted(set(gpu.sleeps))


def test_a_call_that_waits_for_the_gpu_is_timed_all_the_same(gpu):
    def call():
        gpu.launch(0.1, 0.01)
        gpu.host = max(gpu.host, gpu.free_at)

    assert timing._gpu_ms(call) > 0
    assert gpu.sleeps[-1] == timing._LONGEST_SLEEP and len(gpu.sleeps) == 5
