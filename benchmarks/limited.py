"""Commands with a limit of time, which holds for everything that they start."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def run(command: Sequence[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[Any]:
    """As ``subprocess.run``, but what the command has started ends with it where it takes too long or this is interrupted.

    A process that is only killed leaves its children behind, and a benchmark's hold the GPU.

    :param options: of ``subprocess.Popen``.
    :raises subprocess.TimeoutExpired: it took longer than ``seconds``.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as child:
        try:
            out, err = child.communicate(timeout=seconds)
        except BaseException:
            _kill_family(child.pid)
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def _kill_family(pid: int) -> None:
    """Kill a process, all that came of it, and their process groups.

    Both, because a command of the family may have put its own into another group, and a process whose parent has ended is
    known by its group alone.
    """
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            _state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            children[int(parent)].append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family += children[member]
    groups = set()
    for member in family:
        with suppress(ProcessLookupError):
            groups.add(os.getpgid(member))
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
