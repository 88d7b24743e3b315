"""Scripts as processes of their own, forked from a server that has already imported everything.

A fork costs a fraction of a second where a new Python costs many; what is killed, and how, is as real. Benchmarks and
tests share it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

from spattn_olmoe import commands

GRACE = 30.0
"""Seconds from SIGTERM to SIGKILL, as torchrun's."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["benchmarks.preloaded"])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process on a CPU that finds the package: one thread, for bits that do not depend on the
    machine's cores, and no ranks of an outer launcher."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in commands.environment().items() if key not in ranks}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(extra or {})}


def start(
    argv: Sequence[str],
    out: Path,
    err: Path | None = None,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start ``python argv...`` with nothing to read, in a process group of its own.

    :param argv: a script and its arguments, or ``-m`` and a module's, or ``-c`` and those of code.
    :param out: what it prints is appended here, and its errors to ``err``, which is the same file if left out.
    :param env: added to :func:`environment`.
    """
    process = _server.Process(target=_run, args=(list(argv), out, err or out, cwd or Path.cwd(), environment(env)))
    _serve()
    process.start()
    return process


def _serve() -> None:
    """Start the server if it does not run. It finds what it preloads by the folder it is started in, and passes over what
    it does not find: so it starts at the top of the checkout, wherever its caller is."""
    folder = Path.cwd()
    os.chdir(commands.ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder)


def run(
    *argv: str, cwd: Path, env: Mapping[str, str] | None = None, ranks: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as ``subprocess.run`` would; on several ranks as a launcher would: when one fails, all end.

    :returns: exit status (of the rank that failed first), output and errors (of all ranks).
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        processes = [start(argv, out, err, cwd=cwd, env={**(env or {}), **rank}) for rank in ranks_of(ranks)]
        status = wait(processes, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(argv, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


def wait(ranks: Sequence[BaseProcess], timeout: float) -> int | None:
    """The exit status of the rank that failed first, after which the others are ended as a launcher ends them; else 0.

    :returns: None if not all have ended in time: then all are killed.
    """
    deadline, running, status = time.monotonic() + timeout, list(ranks), 0
    while running and not status:
        if not connection.wait([rank.sentinel for rank in running], max(0.0, deadline - time.monotonic())):
            break
        ended = [rank for rank in running if rank.exitcode is not None]
        running = [rank for rank in running if rank not in ended]
        status = next((rank.exitcode for rank in ended if rank.exitcode), 0)
    late = bool(running) and not status
    for rank in running:
        rank.kill() if late else rank.terminate()
    for rank in running:
        rank.join(GRACE)
        rank.kill()
        rank.join()
    return None if late else status


def ranks_of(n: int) -> list[dict[str, str]]:
    """What a launcher of ``n`` processes on this machine puts into the environment of each."""
    if n == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r), "OLMO_SHARED_FS": "1"} for r in range(n)]


def _run(argv: list[str], out: Path, err: Path, cwd: Path, env: dict[str, str]) -> None:
    """``python argv...`` in this process."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    assert "spattn_olmoe.train.run" in sys.modules, "the server did not import benchmarks.preloaded"
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who starts this may run under nohup, and a child would inherit that
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    try:
        match argv:
            case "-m", module, *_:
                sys.argv = argv[1:]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case "-c", code, *arguments:
                sys.argv = ["-c", *arguments]
                sys.modules["__main__"] = main = ModuleType("__main__")
                exec(compile(code, "<string>", "exec"), vars(main))
            case _:
                sys.argv = argv
                runpy.run_path(argv[0], run_name="__main__")
    except Exception:  # as Python does, where multiprocessing would print it in its own way
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
