"""One command on one input, in a forked process that is watched: how it ends, what it imports, what it touches.

A fork costs a fraction of a second where a new Python costs many, and what a command does to it is as real.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from spattn_olmoe.commands import ROOT
from spattn_olmoe.train.ranges import RANGES

SECONDS = 20.0
"""Of processor time, so that a busy machine makes no hang; of sleep, three times as long."""
MEGABYTES = 3000
CANARY = "evilmod"
"""A module that lies on the path of every command and must never be imported."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ANSWERS_NO = ("check_env.py", "train.py")
"""Scripts for which status 1 is an answer: this machine cannot; a run that went wrong in its steps, with a message."""
PROGRAMS = (
    "git",
    "nvidia-smi",
    "sinfo",
    "squeue",
    "sbatch",
    "kubectl",
    "lscpu",
    "uname",
    "rocminfo",
    "/sbin/ldconfig",
    "gcc",
    "cc",
)
"""What commands may start to look at a machine."""

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
    return End(**{**vars(end), "fault": _fault(argv, end, text, hung, seen)})


def _wait(child: int) -> tuple[int, Any, bool]:
    begun = used = 0.0
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage, os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        if (now := _processor_seconds(child)) > used:
            begun, used = time.monotonic(), now
        if time.monotonic() > begun + 3 * SECONDS:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, True
        time.sleep(0.005)


def _processor_seconds(process: int) -> float:
    """What a process has used; itself alone, not those that it has started."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12]) + 1) / os.sysconf("SC_CLK_TCK")


def _fault(argv: list[str], end: End, text: str, hung: bool, seen: Path) -> str:
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
    if "\x1b" in text:
        return "escape: a control character of the input is in what is printed"
    if end.status == 2 and len(errors) != 1:
        return f"lines: {len(errors)} of error"
    if end.status not in (0, 2) and not (end.status == 1 and argv[0] in ANSWERS_NO):
        return f"status: {end.status}"
    return nonsense(argv, seen.parent) if end.status == 0 else ""


def nonsense(argv: list[str], folder: Path) -> str:
    """What is wrong with a command that ended well: values that no run may have, no model, text that became markup."""
    for word in argv[1:] if argv[0] in ("train.py", "plan.py", "check_env.py") else ():
        key, equals, text = word.partition("=")
        value = yaml.safe_load(text) if equals and len(text) < 20 and text[:1] in "-.0123456789" else None
        bounds = next((own for pattern, own in RANGES.items() if fnmatchcase(key, pattern)), None)
        if isinstance(value, (int, float)) and (
            not math.isfinite(value) or (bounds is not None and value not in bounds)
        ):
            return f"nonsense: {word} was accepted"
    if argv[0] == "train.py" and not {"--dry-run", "--show"} & set(argv):
        steps = [json.loads(line) for path in folder.glob("**/metrics.jsonl") for line in path.read_text().splitlines()]
        losses = [step["train/CE loss"] for step in steps if "train/CE loss" in step]
        if not losses or any(loss is None or not 0 < loss < 100 for loss in losses):
            return f"nonsense: losses {losses}"
    for path in folder.glob("*.html"):
        if "</script><b>" in path.read_text():
            return "nonsense: text of a file is markup of the page"
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
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        sys.path.insert(0, str(folder / "path"))
        sys.argv = [str(ROOT / "scripts" / argv[0]), *argv[1:]]
        for logger in (logging.getLogger(), *logging.root.manager.loggerDict.values()):
            if isinstance(
                logger, logging.Logger
            ):  # as in a new process: handlers of the parent write to its own streams
                logger.handlers.clear()
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
    own = (str(folder.resolve()), "/dev/null", "/dev/full", "/dev/shm", "/proc/self")
    handle = os.open(seen.parent, os.O_RDONLY)

    def report(text: str) -> None:
        out = os.open(seen.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, dir_fd=handle)
        os.write(out, f"{text}\n".encode(errors="replace"))
        os.close(out)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "import" and str(args[0]).split(".")[0] == CANARY:
            report(f"imported {args[0]}")
        elif event in _RUNS and not _looks(event, args):
            report(f"ran {event} {str(args)[:200]}")
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(own) and os.path.basename(path) != seen.name:
                report(f"wrote {path}")
        elif event in _CHANGES and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(args[0]))))
            if not path.startswith(own):
                report(f"changed {os.fsdecode(args[0])}")

    def _looks(event: str, args: tuple[Any, ...]) -> bool:
        return event == "subprocess.Popen" and os.fsdecode(args[0]).rpartition("/")[2] in PROGRAMS

    sys.addaudithook(watch)
    yield
