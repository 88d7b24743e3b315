"""Kill a training run at random moments and compare its loss curve with that of a run that was left alone.

    python scripts/benchmark.py soak configs/quickstart.yaml FOLDER [key=value ...]

The run is started with one command, ended with SIGKILL or SIGTERM, and started with the same command again, until it has
been ended often enough; then it is left to finish. Loss and gradient norm of every step must be equal, bit for bit.

Processes are forked from a server that has imported everything: a new Python each time would take most of the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import arguments
from spattn_olmoe import machine
from spattn_olmoe.train.metrics import read_metrics

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
LIMIT = 300.0
"""Seconds in which a process must get on by a step, or end."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["spattn_olmoe.train.run", "spattn_olmoe.train.dry_run", "spattn_olmoe.train.config"])


def train(arguments: list[str], output: str) -> None:
    """``python scripts/train.py ...`` in this process."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Trial:
    """A run in a folder."""

    def __init__(self, config: str, folder: Path, overrides: list[str]):
        self.run, self.log = folder, folder.with_suffix(".log")
        self.arguments = [f"--config={config}", f"trainer.save_folder={folder}", *overrides]

    def start(self) -> Any:
        process = _server.Process(target=train, args=(self.arguments, str(self.log)))
        process.start()
        return process

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
        try:
            return max(read_metrics(self.run), default=0)
        except FileNotFoundError:
            return 0

    @property
    def curve(self) -> dict[int, tuple[float, float]]:
        """Loss and norm of the gradient by step."""
        return {
            step: (m["train/CE loss"], m["optim/total grad norm"])
            for step, m in read_metrics(self.run).items()
            if "train/CE loss" in m
        }

    def kill(self, target: int, delay: float, how: signal.Signals) -> dict[str, Any]:
        """Start, and end it ``delay`` seconds after it has reached a step, or after its start if it has done so before."""
        before, process = self.step, self.start()
        deadline = time.monotonic() + LIMIT
        while self.step < target:
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                raise ValueError(f"step {target} was not reached (exit status {process.exitcode}), see {self.log}")
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(process.pid, how)
        process.join(LIMIT)
        if process.exitcode not in (-how, 128 + how):  # SIGTERM before the first step ends it at once
            process.kill()
            raise ValueError(f"{how.name} led to exit status {process.exitcode}, see {self.log}")
        return {"signal": how.name, "exit_status": process.exitcode, "from_step": before, "at_step": self.step}


def soak(config: str, folder: Path, overrides: list[str], *, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """One run left alone, one ended ``kills`` times."""
    overrides = [*overrides, f"trainer.max_duration.value={steps}", "trainer.max_duration.unit=steps"]
    alone, killed = Trial(config, folder / "alone", overrides), Trial(config, folder / "killed", overrides)
    seconds = alone.finish()
    chance = random.Random(seed)
    ends: list[dict[str, Any]] = []
    begun = time.monotonic()
    for i in range(kills):
        # The targets move through the run; one that is reached already ends a process as it starts and loads.
        target = max(0, round((i + chance.uniform(-1, 1)) * 0.9 * steps / kills))
        reached = target <= killed.step
        delay = chance.uniform(0, 3.0) if reached else chance.uniform(0, 0.3)
        ends.append(killed.kill(target, delay, chance.choice([signal.SIGKILL, signal.SIGTERM])))
        print(ends[-1], flush=True)
    killed.finish()
    a, b = alone.curve, killed.curve
    log = killed.log.read_text(errors="replace")
    return {
        "steps": steps,
        "alone_seconds": round(seconds, 1),
        "killed_seconds": round(time.monotonic() - begun, 1),
        "kills": len(ends),
        "signals": dict(Counter(end["signal"] for end in ends)),
        "exit_statuses": dict(Counter(str(end["exit_status"]) for end in ends)),
        "resumed_from_a_checkpoint": log.count("Checkpoint successfully loaded"),
        "unfinished_checkpoints_passed_over": log.count("was never finished"),
        "ends": ends,
        "last_loss": [a[steps][0], b[steps][0]],
        "steps_that_differ": [step for step in sorted({*a, *b}) if a.get(step) != b.get(step)],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_kills(parser, 50, "soak.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=250)


def run(args: argparse.Namespace) -> int:
    args.folder.mkdir(parents=True)
    record = machine.describe("cpu")
    record["result"] = result = soak(
        args.config, args.folder, args.overrides, kills=args.kills, steps=args.steps, seed=args.seed
    )
    machine.write_json(args.results, record)
    if result["steps_that_differ"]:
        raise ValueError(f"{result['kills']} kills: these steps differ: {result['steps_that_differ']}")
    print(f"{result['kills']} kills: all {result['steps']} steps are identical")
    return 0
