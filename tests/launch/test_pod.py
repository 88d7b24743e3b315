"""What a pod runs, as two pods on this machine, with ranks that only end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.forked import environment, ranks_of
from spattn_olmoe.commands import ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from spattn_olmoe.exit_code import kept_exit_code

def main():
    signal.signal(signal.SIGTERM, lambda *_: Path("stop").touch())
    Path(f"runs-{os.environ['RANK']}").touch()
    if sys.argv[1] != "wait":
        sys.exit(int(sys.argv[1]))
    while not Path("stop").exists():  # which all ranks heed, as those of a training
        time.sleep(0.05)
    sys.exit(143)

with kept_exit_code():
    main()
"""


def pods(folder: Path, argument: str) -> list[subprocess.Popen[bytes]]:
    """Pods 0 and 1, which share a folder."""
    (folder / "rank.py").write_text(RANK)
    env = environment({"SPATTN_EXIT_CODE": "run/exit_code", "TORCH_FR_DUMP_TEMP_FILE": "run/flight/rank_"})
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    port = ranks_of(2)[0]["MASTER_PORT"]
    command = [
        "bash",
        str(ROOT / "scripts/launch/pod.sh"),
        "--nnodes=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    (folder / "run").mkdir()
    (folder / "run/exit_code").write_text("2\n")  # of an earlier attempt
    with (folder / "log").open("ab") as log:
        return [
            subprocess.Popen(
                [*command, f"--node_rank={i}", "rank.py", argument],
                cwd=folder,
                env=env,
                stderr=log,
                start_new_session=True,
            )
            for i in range(2)
        ]


def ended(started: list[subprocess.Popen[bytes]]) -> list[int]:
    try:
        return [pod.wait(120) for pod in started]
    finally:
        for pod in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.pid, signal.SIGTERM)


def test_a_wrong_config_ends_all_pods_with_2(tmp_path: Path):
    assert ended(pods(tmp_path, "2")) == [2, 2], (tmp_path / "log").read_text()
    assert (tmp_path / "run/flight").is_dir()


@pytest.mark.parametrize("evicted", [0, 1])
def test_all_pods_end_with_143_when_one_is_told_to_stop(tmp_path: Path, evicted: int):
    started = pods(tmp_path, "wait")
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"runs-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    os.kill(started[evicted].pid, signal.SIGTERM)
    assert ended(started) == [143, 143], (tmp_path / "log").read_text()
