"""A real Slurm, and what a user of it has."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.slurm_cluster import SlurmCluster
from benchmarks.tiny import write_data
from spattn_olmoe.commands import ROOT

AROUND = {
    "scontrol": 'rm "$here/controller-is-away" 2>/dev/null && exit 1; exec "$real" "$@"',
    "date": 'if [ -e "$here/clock-is-fast" ]; then echo $(($("$real" +%s) * 10000)); else exec "$real" "$@"; fi',
    "find": 'status=0; "$real" "$@" || status=$?; if [ -e "$here/find-fails" ]; then status=1; fi; exit "$status"',
}
"""Commands that the script meets the real ones through, and what a file at the top of the checkout makes them do: a controller
that does not answer once, seconds that are hours, a folder that cannot be read."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def submit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: a checkout with its environment. And the data."""
    folder = tmp_path_factory.mktemp("checkout")
    activate = folder / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    (folder / "bin").mkdir()
    for name, body in AROUND.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\nreal={shutil.which(name)}\nhere={folder}\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    activate.write_text(
        f'export PATH="{folder}/bin:{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}"\n'
        "export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=\n"
        f"while [ -e {folder}/set-up-is-slow ]; do touch {folder}/set-up-waits; sleep 0.1; done\n"
    )
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "pauses").mkdir()
    write_data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def no_job_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        cluster.run("scancel", "--user=root", check=False)
        cluster.wait(
            lambda: cluster.run("squeue", "--noheader") == "", "an empty queue", 180
        )  # Slurm's KillWait and more
