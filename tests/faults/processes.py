"""Training runs as processes of their own, as often as a test likes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.forked import ranks_of, start, wait
from benchmarks.tiny import BASE, ROOT, TINY, run_overrides

SCRIPT = ROOT / "scripts" / "train.py"
LIMIT = 300.0
"""Seconds after which a process that should have ended is a failure."""


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
        envs = [
            {**rank, **{key: value.format(**rank) for key, value in (env or {}).items()}} for rank in ranks_of(ranks)
        ]
        with self._logged(argv, envs) as processes:
            yield processes

    @contextlib.contextmanager
    def launched(self, *overrides: str, ranks: int) -> Iterator[Any]:
        """The launcher of a start on several ranks."""
        argv = command(self.folder, self.data, *self.overrides, *overrides)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *argv]
        with self._logged(launcher, [{"OLMO_SHARED_FS": "1"}]) as processes:
            yield processes[0]

    @property
    def _output(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}{self.suffix}.log")

    @contextlib.contextmanager
    def _logged(self, argv: list[str], envs: list[dict[str, str]]) -> Iterator[list[Any]]:
        self._output.unlink(missing_ok=True)
        processes: list[Any] = []
        try:
            processes += (start(argv, self._output, env=env) for env in envs)
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.join()
            if self._output.exists():
                self.log = self._output.read_text(errors="replace")

    def wait(self, processes: list[Any]) -> int:
        status = wait(processes, LIMIT)
        assert status is not None, f"still running:\n{self._output.read_text()[-3000:]}"
        return status

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
        from spattn_olmoe.metrics import curve

        return curve(self.folder)

    def steps(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step*"))

    def files(self, checkpoint: str) -> dict[str, tuple[int, int]]:
        """Each file of a checkpoint, with what changes when it is written again."""
        root = self.folder / checkpoint
        found = {path.relative_to(root).as_posix(): path.stat() for path in root.rglob("*") if path.is_file()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in sorted(found.items())}
