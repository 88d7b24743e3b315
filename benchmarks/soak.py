"""Disturb a training run at random moments and compare its loss curve with that of a run that was left alone.

    python scripts/benchmark.py soak configs/quickstart.yaml FOLDER [key=value ...]

The run is started with one command, disturbed, and started with the same command again, until that has happened often
enough; then it is left to finish. Loss and gradient norm of every step must be equal, bit for bit. Disturbances are SIGKILL,
SIGTERM and SIGHUP, a second process with the same command (which must be refused, the first must not notice) and,
with ``--disk``, a disk that is filled until the run ends (on which a start must be refused, too).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import arguments, forked
from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT
from spattn_olmoe.errors import whole
from spattn_olmoe.metrics import curve, last_step

LIMIT = 300.0
"""Seconds in which a process must get on by a step, or end."""

SIGNALS = {number.name: number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)}
SECOND, FULL = "a second process", "a full disk"


class Trial:
    """A run in a folder."""

    def __init__(self, config: str, folder: Path, overrides: list[str]):
        self.run, self.log = folder, folder.with_suffix(".log")
        self.arguments = [
            str(ROOT / "scripts/train.py"),
            f"--config={config}",
            f"trainer.save_folder={folder}",
            *overrides,
        ]

    def start(self) -> Any:
        return forked.start(self.arguments, self.log)

    def finish(self) -> float:
        """Seconds until the run has ended by itself."""
        begun = time.monotonic()
        process = self.start()
        process.join()
        if process.exitcode:
            raise ValueError(f"the run failed with status {process.exitcode}, see {self.log}")
        return time.monotonic() - begun

    @property
    def step(self) -> int:
        """The last step in the metrics file."""
        return last_step(self.run)

    @property
    def curve(self) -> dict[int, tuple[float, float]]:
        """Loss and norm of the gradient by step."""
        return curve(self.run)

    def disturb(self, target: int, delay: float, how: str) -> dict[str, Any]:
        """Start, and disturb it ``delay`` seconds after it has reached a step, or after its start if it has done so before.

        :param how: the name of a signal, :data:`SECOND` or :data:`FULL`.
        """
        before, process = self.step, self.start()
        deadline = time.monotonic() + LIMIT
        while self.step < target:
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                raise ValueError(f"step {target} was not reached (exit status {process.exitcode}), see {self.log}")
            time.sleep(0.01)
        time.sleep(delay)
        more: dict[str, Any] = {}
        if how == SECOND:
            more["second_exit_status"] = self._refused("is in use")
            if not process.is_alive():
                raise ValueError(f"a second process ended the first, see {self.log}")
            os.kill(process.pid, signal.SIGHUP)
        elif how == FULL:
            with self._full_disk():
                process.join(LIMIT)
                more["start_exit_status"] = self._refused("No space left on device")
        else:
            os.kill(process.pid, SIGNALS[how])
        process.join(LIMIT)
        number = SIGNALS.get(how, signal.SIGHUP)
        # A signal before the first step ends a run at once; a disk that is full ends it with an error.
        expected = (1, 2) if how == FULL else (-number, 128 + number)
        if process.exitcode not in expected:
            process.kill()
            raise ValueError(f"{how} led to exit status {process.exitcode}, see {self.log}")
        return {
            "disturbance": how,
            "exit_status": process.exitcode,
            **more,
            "from_step": before,
            "at_step": self.step,
        }

    def _refused(self, words: str) -> int:
        """The status of another process with the same command, which must end with a line that holds these words."""
        log = self.log.with_suffix(".second.log")
        log.unlink(missing_ok=True)
        second = forked.start(self.arguments, log)
        second.join(LIMIT)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if second.exitcode not in (1, 2) or not lines or words not in lines[-1] or "Traceback" in log.read_text():
            second.kill()
            raise ValueError(f"expected a last line with {words!r} and status 1 or 2, not {second.exitcode}, see {log}")
        return second.exitcode

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Fill the disk of the run's folder to the last byte while the context lasts."""
        ballast = self.run / "ballast"
        try:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
            yield
        finally:
            ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int | None) -> Iterator[None]:
    """A file system of its own at a folder while the context lasts; None leaves the folder as it is."""
    if megabytes is None:
        yield
        return
    folder.mkdir(parents=True)
    size = f"size={megabytes}m"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        raise ValueError(f"--disk {megabytes}: no file system of that size can be mounted ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def soak(trials: tuple[Trial, Trial], kinds: list[str], *, disturbances: int, steps: int, seed: int) -> dict[str, Any]:
    """One run left alone, one disturbed so many times, each kind as often as another."""
    alone, disturbed = trials
    seconds = alone.finish()
    chance = random.Random(seed)
    order = [kinds[i % len(kinds)] for i in range(disturbances)]
    chance.shuffle(order)
    ends: list[dict[str, Any]] = []
    begun = time.monotonic()
    for i, how in enumerate(order):
        # The targets move through the run; one that is reached already ends a process as it starts and loads.
        target = max(0, round((i + chance.uniform(-1, 1)) * 0.9 * steps / disturbances))
        if how in (SECOND, FULL):  # which need a run that has its folder
            target = max(target, disturbed.step + 1)
        delay = chance.uniform(0, 3.0) if target <= disturbed.step else chance.uniform(0, 0.3)
        ends.append(disturbed.disturb(target, delay, how))
        print(ends[-1], flush=True)
    disturbed.finish()
    a, b = alone.curve, disturbed.curve
    log = disturbed.log.read_text(errors="replace")
    return {
        "steps": steps,
        "alone_seconds": round(seconds, 1),
        "disturbed_seconds": round(time.monotonic() - begun, 1),
        "disturbances": dict(Counter(end["disturbance"] for end in ends)),
        "exit_statuses": dict(Counter(str(end["exit_status"]) for end in ends)),
        "second_processes_refused": sum("second_exit_status" in end for end in ends),
        "starts_refused_on_the_full_disk": sum("start_exit_status" in end for end in ends),
        "resumed_from_a_checkpoint": log.count("resuming from "),
        "unfinished_checkpoints_passed_over": log.count("was never finished"),
        "checkpoints_at_the_end": sorted(path.name for path in disturbed.run.glob("step*")),
        "ends": ends,
        "last_loss": [a[steps][0], b[steps][0]],
        "steps_that_differ": [step for step in sorted({*a, *b}) if a.get(step) != b.get(step)],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_kills(parser, 50, "soak.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=whole(1, 10**6), default=250)
    parser.add_argument(
        "--disk", type=whole(1, 10**6), metavar="MB", help="give the run a disk of so much and fill it (as root)"
    )


def run(args: argparse.Namespace) -> int:
    args.folder.mkdir(parents=True)
    overrides = [*args.overrides, f"trainer.max_duration.value={args.steps}", "trainer.max_duration.unit=steps"]
    alone, disturbed = (Trial(args.config, args.folder / name, overrides) for name in ("alone", "disturbed"))
    kinds = [*SIGNALS, SECOND, *([FULL] if args.disk else [])]
    record = machine.describe("cpu")
    with small_disk(disturbed.run, args.disk):
        record["result"] = result = soak(
            (alone, disturbed), kinds, disturbances=args.kills, steps=args.steps, seed=args.seed
        )
    machine.write_json(args.results, record)
    if result["steps_that_differ"]:
        raise ValueError(f"{args.kills} disturbances: these steps differ: {result['steps_that_differ']}")
    print(f"{args.kills} disturbances: all {result['steps']} steps are identical")
    return 0
