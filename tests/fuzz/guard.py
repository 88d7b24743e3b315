"""One command on one input, in a forked process that is watched: how it ends, what it imports, what it touches.

A fork costs a fraction of a second where a new Python costs many, and what a command does to it is as real.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 20.0
"""Of processor time, so that a busy machine makes no hang; a process that sleeps is given three times as long."""
MEGABYTES = 3000
CANARY = "evilmod"
"""A module that lies on the path of every command and must never be imported."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink", "os.link", "shutil.rmtree")


@dataclass(frozen=True)
class End:
    """How a command ended.

    :param fault: what was wrong with that, in a word or a line; empty if nothing was.
    """

    status: int
    seconds: float
    megabytes: int
    output: str
    fault: str = ""

    @property
    def kind(self) -> str:
        return self.fault.partition(":")[0] or ("accepted" if self.status == 0 else "refused")


def run(argv: list[str], folder: Path) -> End:
    """Run ``scripts/argv[0]`` with arguments in a folder, which is all that it may write to."""
    output, seen = folder / ".output", folder / ".seen"
    before = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(argv, folder, output, seen)
    status, usage, hung = _wait(child)
    text = output.read_text(errors="replace") if output.exists() else ""
    end = End(os.waitstatus_to_exitcode(status), time.monotonic() - before, usage.ru_maxrss // 1024, text[-4000:])
    return End(**{**vars(end), "fault": _fault(end, text, hung, seen)})


def _wait(child: int) -> tuple[int, Any, bool]:
    deadline = time.monotonic() + 3 * SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage, os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, True
        time.sleep(0.005)


def _fault(end: End, text: str, hung: bool, seen: Path) -> str:
    if seen.exists():
        return f"guard: {seen.read_text(errors='replace').splitlines()[0]}"
    if hung:
        return "hang"
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:200]}"
    if end.status < 0:
        return f"signal: {-end.status}"
    if end.megabytes > MEGABYTES:
        return f"memory: {end.megabytes} MB"
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if end.status == 2 and len(errors) != 1:
        return f"lines: {len(errors)} of error"
    if end.status not in (0, 2):
        return f"status: {end.status}"
    return ""


def _child(argv: list[str], folder: Path, output: Path, seen: Path) -> None:
    """What the forked process does; it never returns."""
    status = 1
    try:
        import resource

        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
        used = sum(os.times()[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + SECONDS), int(used + SECONDS) + 5))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder)
        sys.path.insert(0, str(folder / "path"))
        sys.argv = [str(ROOT / "scripts" / argv[0]), *argv[1:]]
        with _watched(folder, seen):
            status = _status(sys.argv[0])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


@contextlib.contextmanager
def _watched(folder: Path, seen: Path) -> Iterator[None]:
    """Write down the first thing that no command may do while it lasts."""
    own = (str(folder.resolve()), "/dev/null", "/dev/shm", "/proc/self")
    handle = os.open(seen.parent, os.O_RDONLY)

    def report(text: str) -> None:
        out = os.open(seen.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, dir_fd=handle)
        os.write(out, f"{text}\n".encode(errors="replace"))
        os.close(out)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "import" and str(args[0]).split(".")[0] == CANARY:
            report(f"imported {args[0]}")
        elif event in _RUNS:
            report(f"ran {event} {str(args)[:200]}")
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(own) and os.path.basename(path) != seen.name:
                report(f"wrote {path}")
        elif event in _CHANGES and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(args[0]))))
            if not path.startswith(own):
                report(f"changed {os.fsdecode(args[0])}")

    sys.addaudithook(watch)
    yield
