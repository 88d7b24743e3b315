"""Median times of several calls that take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Call = Callable[[], object]

_SLEEP_CYCLES = 5_000_000
"""Some 2.5 milliseconds, in which the host queues the launches of a call: it takes half a millisecond and more for them."""
_LONGEST_SLEEP = 16 * _SLEEP_CYCLES
"""Enough for a few hundred launches. A call that itself waits for the GPU fits no sleep, and is timed with its waits."""


class Timing(NamedTuple):
    """Milliseconds of one call: median, 20th and 80th percentile, and how often it was timed."""

    ms: float
    p20: float
    p80: float
    rounds: int


def take_turns(
    calls: Mapping[str, Call], device: str, seconds: float = 2.0, rounds: tuple[int, int] = (5, 50)
) -> dict[str, Timing]:
    """Time every call once a round, for about so many seconds in all, and at least ``rounds[0]`` rounds.

    On a GPU: time between two events, after a pause in which the host queues the launches, and with a cold L2 cache.
    The host's own overhead is therefore not in it.
    """
    timer = _gpu_ms if device == "cuda" else _cpu_ms
    for call in calls.values():  # compiles, and fills caches
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for n in range(rounds[1]):
        if n >= rounds[0] and time.monotonic() > end:
            break
        for name, call in calls.items():
            samples[name].append(timer(call))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    n = len(ordered)
    return Timing(statistics.median(ordered), ordered[n // 5], ordered[n - 1 - n // 5], n)


def _cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _gpu_ms(call: Call) -> float:
    cycles = _SLEEP_CYCLES
    while True:
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        all_queued = not start.query()  # else the GPU began before the host was done, and may have waited for it
        end.synchronize()
        if all_queued or cycles >= _LONGEST_SLEEP:
            return start.elapsed_time(end)
        cycles *= 2


def peak_bytes(call: Call) -> int:
    """Most GPU memory that a call holds beyond what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
