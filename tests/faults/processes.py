"""Training runs as processes of their own, started by a server that has already imported everything.

A fork costs a fraction of a second where a new Python costs many: what is killed, and how, is as real.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tiny import BASE, ROOT, TINY, environment, run_overrides

SCRIPT = ROOT / "scripts" / "train.py"
LIMIT = 300.0
"""Seconds after which a process that should have ended is a failure."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.faults.preloaded"])


def command(run: Path, data: Path, *overrides: str) -> list[str]:
    """The arguments of ``scripts/train.py``: twelve steps, saved at 4, 8 and 12."""
    return [
        str(SCRIPT),
        f"--config={BASE}",
        "--trust=tests.faults.injected",
        *TINY,
        *run_overrides(run, data),
        "attention.type=spattention",
        "trainer.max_duration.value=12",
        "trainer.callbacks.checkpointer.save_interval=4",
        *overrides,
    ]


@dataclass
class Run:
    """One command in a folder, started as often as a test likes."""

    folder: Path
    data: Path
    overrides: tuple[str, ...] = ()
    suffix: str = ""
    """Of the log's name: for a second command in the same folder at the same time."""
    log: str = field(default="", init=False)
    """What the processes of the last start wrote, both streams."""

    def __call__(self, *overrides: str, ranks: int = 1, **options: Any) -> int:
        """Run to the end; returns the exit status, of the first rank that failed if there are several."""
        with self.started(*overrides, ranks=ranks, **options) as processes:
            return self.wait(processes)

    @contextlib.contextmanager
    def started(
        self, *overrides: str, ranks: int = 1, arguments: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> Iterator[list[Any]]:
        """The processes of a start, one a rank; nothing of them is left afterwards.

        :param env: added to the environment; ``{RANK}`` in a value is the process's.
        """
        argv = command(self.folder, self.data, *self.overrides, *overrides) + list(arguments)
        with self._logged(
            (
                train,
                argv,
                {**rank_env, **{key: value.format(**rank_env) for key, value in (env or {}).items()}},
                self._output,
            )
            for rank_env in _ranks(ranks)
        ) as processes:
            yield processes

    @contextlib.contextmanager
    def launched(self, *overrides: str, ranks: int) -> Iterator[Any]:
        """The launcher of a start on several ranks."""
        argv = command(self.folder, self.data, *self.overrides, *overrides)
        launcher = ["--standalone", f"--nproc-per-node={ranks}", *argv]
        with self._logged([(launch, launcher, self._output)]) as processes:
            yield processes[0]

    @property
    def _output(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}{self.suffix}.log")

    @contextlib.contextmanager
    def _logged(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[list[Any]]:
        self._output.unlink(missing_ok=True)
        processes = [_server.Process(target=function, args=args) for function, *args in calls]
        try:
            for process in processes:
                process.start()
            yield processes
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
            if self._output.exists():
                self.log = self._output.read_text(errors="replace")

    def wait(self, processes: list[Any]) -> int:
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"still running:\n{self._output.read_text()[-3000:]}"
        return next((p.exitcode for p in processes if p.exitcode), 0)

    def until(self, true: Callable[[], bool], process: Any) -> None:
        """Wait for something that the run does."""
        deadline = time.monotonic() + LIMIT
        while not true():
            assert process.is_alive() and time.monotonic() < deadline, self._output.read_text()[-3000:]
            time.sleep(0.005)

    def until_said(self, words: str, process: Any) -> None:
        self.until(lambda: self._output.exists() and words in self._output.read_text(errors="replace"), process)

    def messages(self) -> str:
        """OLMo-core's own lines, which go to a file of the run and not to the screen."""
        return (self.folder / "train.log").read_text(errors="replace")

    @property
    def curve(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by step, as far as the run has written them."""
        from spattn_olmoe.train.metrics import curve

        return curve(self.folder)

    def steps(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step*"))


def _ranks(n: int) -> list[dict[str, str]]:
    if n == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r), "OLMO_SHARED_FS": "1"} for r in range(n)]


def train(argv: list[str], env: dict[str, str], output: Path) -> None:
    """``python scripts/train.py ...`` in this process."""
    assert "spattn_olmoe.train.run" in sys.modules  # multiprocessing passes over a preload that cannot be imported
    _alone(output, env)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:  # as Python does, where multiprocessing would print it in its own way
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _alone(output: Path, env: dict[str, str]) -> None:
    """A process group, an environment and a log of its own."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, and a child would inherit that
    inherited = environment(env)
    os.environ.clear()
    os.environ.update(inherited)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def launch(arguments: list[str], output: Path) -> None:
    """``torchrun ...`` in this process; the ranks are new ones."""
    from torch.distributed.run import main

    _alone(output, {"OLMO_SHARED_FS": "1"})
    main(arguments)
