"""The lock of a folder: held by real processes that live, end, are killed or are on another machine."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tiny_run import ROOT
from spattn_olmoe.lock import Lock

HOLD = """
import os, sys, time
from spattn_olmoe.lock import Lock
Lock(sys.argv[1], beat=0.1)
if sys.argv[2] == "fork" and os.fork() > 0:
    sys.stdin.readline()  # the child says that it is held, once it is a process of its own
    sys.exit()
print("held", flush=True)
time.sleep(60) if sys.argv[2] == "fork" else sys.stdin.readline()
"""


def holder(folder: Path, how: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_process_is_refused_in_words_until_the_first_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    first = holder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(
        ValueError, match=rf"is in use: job 12, process {first.pid} on {socket.gethostname()}, since 20"
    ):
        Lock(tmp_path)
    first.communicate("end\n")
    assert (tmp_path / "lock").read_text() == ""  # freed, without a trace
    lock = Lock(tmp_path)
    with pytest.raises(ValueError, match=f"job 13, process {os.getpid()} "):
        Lock(tmp_path, patience=0)
    lock.release()
    Lock(tmp_path).release()


def test_sigkill_frees_it_at_once_though_children_live_on(tmp_path: Path):
    first = holder(tmp_path, "fork")
    first.kill()
    first.wait()
    started = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - started < 10  # no watching: its beat would take 25 seconds
    kill(first)


def test_the_next_attempt_of_the_same_job_waits_for_the_last_one_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    first = holder(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        Lock(tmp_path, patience=0.1)
    multiprocessing.get_context("fork").Process(target=lambda: (time.sleep(0.5), kill(first))).start()
    Lock(tmp_path, patience=60).release()


ANOTHER = '{"host": "another"}'


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOSYS, "no flock on this file system")


def flock_of_this_machine_alone(*_: object) -> None:
    """Always granted, as to a process on another machine."""


@pytest.mark.parametrize("flock", [no_flock, flock_of_this_machine_alone])
def test_a_holder_on_another_machine_is_known_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[..., None]
):
    first = holder(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with pytest.raises(ValueError, match=f"in use: process {first.pid}"):
        Lock(tmp_path, beat=0.4)
    kill(first)
    lock = Lock(tmp_path, beat=0.4)
    assert '"host": "another"' in (tmp_path / "lock").read_text()
    lock.release()


def test_a_process_whose_lock_was_taken_over_ends(tmp_path: Path):
    first = holder(tmp_path)
    (tmp_path / "lock").write_text(ANOTHER)
    assert first.wait(timeout=30) == 1
    assert (tmp_path / "lock").read_text() == ANOTHER


@pytest.mark.parametrize("removed", [False, True])
def test_the_lock_of_another_holder_is_not_freed(tmp_path: Path, removed: bool):
    lock = Lock(tmp_path)
    (tmp_path / "lock").write_text(ANOTHER)
    if removed:
        (tmp_path / "lock").unlink()
    lock.release()
    assert removed or (tmp_path / "lock").read_text() == ANOTHER


def test_a_run_that_stood_still_ends_and_the_one_that_took_over_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = holder(tmp_path)
    os.killpg(first.pid, signal.SIGSTOP)
    monkeypatch.setattr(fcntl, "flock", no_flock)
    second = Lock(tmp_path, beat=0.2)
    record = (tmp_path / "lock").read_text()
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait(timeout=30) == 1
    assert (tmp_path / "lock").read_text() == record and f'"pid": {os.getpid()}' in record
    second.release()
    assert (tmp_path / "lock").read_text() == ""
