"""Memory that a step frees stays with the process, for the next step.

glibc gives large blocks back to the system as soon as they are free, and every step asks for them anew: 25,000 page faults
a step of the quickstart, a tenth of its time on one thread. On two threads they cost twice as much after the first
checkpoint, and steps took 1.2 to 1.5 times as long from there to the end of the run.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt(3)
LARGEST = 2**30
"""Bytes up to which a block comes from the heap, which keeps it, and not from the system."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to its peak. False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
