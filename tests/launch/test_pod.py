"""What a pod runs, as two pods on this machine: a training of two ranks."""

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
from benchmarks.tiny import write_data
from spattn_olmoe.commands import ROOT
from tests.faults.processes import command


def pods(folder: Path, *overrides: str) -> list[subprocess.Popen[bytes]]:
    """Pods 0 and 1, which share a folder."""
    write_data(folder / "data")
    run = folder / "run"
    run.mkdir()
    (run / "exit_code").write_text("2\n")  # of an earlier attempt
    files = {"SPATTN_EXIT_CODE": f"{run}/exit_code", "TORCH_FR_DUMP_TEMP_FILE": f"{run}/flight/rank_"}
    env = environment({**files, "OLMO_SHARED_FS": "1", "OMP_NUM_THREADS": "1"})
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    port = ranks_of(2)[0]["MASTER_PORT"]
    script = [
        "bash",
        str(ROOT / "scripts/launch/pod.sh"),
        "--nnodes=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    with (folder / "log").open("ab") as log:
        return [
            subprocess.Popen(
                [*script, f"--node_rank={i}", *command(run, folder / "data", *overrides)],
                cwd=folder,
                env=env,
                stdout=log,
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
    assert ended(pods(tmp_path, "model.n_layer=2")) == [2, 2], (tmp_path / "log").read_text()
    assert "error: model.n_layer is not a key" in (tmp_path / "log").read_text()
    assert (tmp_path / "run/flight").is_dir()


@pytest.mark.parametrize("evicted", [0, 1])
def test_all_pods_save_and_end_with_143_when_one_is_told_to_stop(tmp_path: Path, evicted: int):
    started = pods(tmp_path, "trainer.max_duration.value=5000", "trainer.callbacks.checkpointer.save_interval=1000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists():  # of a step: before the first there is nothing to save
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    os.kill(started[evicted].pid, signal.SIGTERM)
    assert ended(started) == [143, 143], (tmp_path / "log").read_text()
    assert len(list((tmp_path / "run").glob("step*/.metadata.json"))) == 1
