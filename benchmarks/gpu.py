"""Everything that takes a GPU, in one command that can be interrupted: correctness, speed, training, loss curves, tiles.

    python scripts/benchmark.py gpu                     # all parts; run it again to resume
    python scripts/benchmark.py gpu --minutes 9         # stop after so long, between parts or within one
    python scripts/benchmark.py gpu --parts tests loss  # only these
    python scripts/benchmark.py gpu --dry-run           # only say what would be run

Results go to ``benchmarks/results/<gpu>/``; ``session.json`` there holds how every part ended, and at which commit. A part
that ended well is not run again at the same commit, and one that was stopped resumes with the settings that are missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT, train_command


class Part(NamedTuple):
    """Commands that are run one after another until one fails, and the seconds they may take together."""

    what: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]


def _benchmark(*args: str) -> tuple[str, ...]:
    return ("scripts/benchmark.py", *args)


def _train(folder: str, *overrides: str) -> tuple[str, ...]:
    save = f"trainer.save_folder={folder}"
    fresh = "trainer.load_strategy=never"  # not the run of an earlier commit
    return tuple(train_command("configs/quickstart.yaml", [save, fresh, *overrides])[1:])


_BF16, _FP32 = ("train_module.dp_config.param_dtype=bfloat16",), ("train_module.dp_config.param_dtype=null",)
_CURVES = {
    "runs/gpu-reference": ("attention.impl=reference", *_BF16),
    "runs/gpu-triton": ("attention.impl=triton", *_BF16),
    "runs/gpu-reference-float32": ("attention.impl=reference", *_FP32),
}

# Most of their time kernels are compiled, on the CPU.
_IN_PARALLEL = ("-n", "auto", "--maxprocesses", "8", "--dist", "load")

PARTS = {
    "tests": Part(
        "the kernels against the float64 reference", 1200, (("-m", "pytest", "tests/gpu", "-q", *_IN_PARALLEL),)
    ),
    "attention-quick": Part(
        "attention at the goals' settings", 600, (_benchmark("attention", "--quick", "--missing"),)
    ),
    "training-quick": Part("steps at the paper's settings", 1200, (_benchmark("training", "--quick", "--missing"),)),
    "loss": Part(
        "the quickstart's loss curve with impl=triton, beside the reference's",
        1200,
        (
            ("scripts/quickstart_corpus.py", "data/quickstart/corpus"),
            ("scripts/prepare_data.py", "--config", "configs/data/quickstart.yaml"),
            *(_train(folder, *overrides) for folder, overrides in _CURVES.items()),
            ("-m", "benchmarks.loss_curves", *_CURVES),
        ),
    ),
    "attention": Part("attention at every setting", 3600, (_benchmark("attention", "--missing"),)),
    "training": Part("steps of both models at every length", 7200, (_benchmark("training", "--missing"),)),
    "tune": Part(
        "tile sizes",
        1800,
        tuple(_benchmark("tune", "--setting", "8x16x4096", "--pattern", name) for name in ("exclusive", "sharing")),
    ),
}
"""In the order of what one wants to know first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--minutes", type=float, help="stop after so long; run again to resume")
    parser.add_argument("--again", action="store_true", help="also the parts that ended well at this commit")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")


def run(args: argparse.Namespace) -> int:
    """Run parts. 0 if all of them have ended well."""
    parts = {name: PARTS[name] for name in PARTS if name in args.parts}
    if args.dry_run:
        for name, part in parts.items():
            print(f"{name}: {part.what}, at most {part.seconds // 60} minutes")
            for command in part.commands:
                print("  python", *command)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --dry-run prints what would be run on one")
    return session(parts, machine.results_folder("cuda"), minutes=args.minutes, again=args.again)


def session(parts: Mapping[str, Part], folder: Path, *, minutes: float | None = None, again: bool = False) -> int:
    """Run parts, their output into ``folder/<part>.log`` and how they ended into ``folder/session.json``.

    :returns: 0 if all parts have ended well, now or before; 1 otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "session.json"
    ended: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    here = machine.describe(machine.default_device())
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    for name, part in parts.items():
        before = ended.get(name, {})
        if before.get("ended") == "well" and before["machine"]["commit"] == here["commit"] and not again:
            print(f"{name}: done on {before['machine']['date']}")
            continue
        left = end - time.monotonic()
        if left <= 0:
            print(f"{name}: not begun, the {minutes:g} minutes are over")
            continue
        print(f"{name}: {part.what} ...", flush=True)
        start = time.monotonic()
        how = _run(part, folder / f"{name}.log", min(part.seconds, left))
        seconds = round(time.monotonic() - start, 1)
        ended[name] = {"ended": how, "seconds": seconds, "commands": [list(c) for c in part.commands], "machine": here}
        machine.write_json(record, ended)
        print(f"{name}: ended {how} after {seconds:.0f} s; see {folder / name}.log", flush=True)
    return 0 if all(ended.get(name, {}).get("ended") == "well" for name in parts) else 1


def _run(part: Part, output: Path, seconds: float) -> str:
    """How a part ended: ``well``, or why it did not."""
    end = time.monotonic() + seconds
    with output.open("w") as file:
        for command in part.commands:
            print("$ python", *command, file=file, flush=True)
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=max(end - time.monotonic(), 0.1),
                )
            except subprocess.TimeoutExpired:
                return f"by its limit of {seconds:.0f} s"
            if done.returncode:
                return f"with exit status {done.returncode} of python {' '.join(command)}"
    return "well"
