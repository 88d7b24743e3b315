"""A limit of time ends all that a command has started."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import limited  # noqa: E402

SLEEPER = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(300)"
ORPHAN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}, sys.argv[1]])"
FAMILY = f"""
import subprocess, sys
from benchmarks import limited
subprocess.run([sys.executable, "-c", {ORPHAN!r}, sys.argv[1]])
limited.run([sys.executable, "-c", {SLEEPER!r}, sys.argv[1]], 300)
"""


def ended(pid):
    """Whether a process is gone, or only waits for its parent to ask how it ended."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_child_in_a_session_of_its_own_and_an_orphan_are_killed_too(tmp_path):
    pids = tmp_path / "pids"
    with pytest.raises(subprocess.TimeoutExpired):
        limited.run([sys.executable, "-c", FAMILY, str(pids)], 6, cwd=ROOT)
    started = pids.read_text().split()
    assert len(started) == 2
    for _ in range(100):
        if all(ended(pid) for pid in started):
            return
        time.sleep(0.05)
    raise AssertionError(f"of {started} some live on")


def test_what_ends_in_time_is_as_it_is_under_subprocess():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = limited.run([sys.executable, "-c", code], 60, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
