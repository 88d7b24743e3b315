"""Everything that takes a GPU, in one command that can be interrupted: correctness, speed, training, loss curves, tiles.

    python scripts/benchmark.py gpu                     # all parts; run it again to resume
    python scripts/benchmark.py gpu --minutes 9         # stop after so long, between parts or within one
    python scripts/benchmark.py gpu --parts tests loss  # only these
    python scripts/benchmark.py gpu --out DIR           # results, and what is resumed, in another folder
    python scripts/benchmark.py gpu --dry-run           # only say what would be run

Results go to ``benchmarks/results/<gpu>/``, as soon as they are there; ``session.json`` there holds how every part ended, and
at which commit. A part that ended well is not run again at the same commit (with changes to it, it is), and one that was
stopped resumes with what is missing. What one wants to know first comes first, and little of it needs more than 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import limited
from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT, relative, train_command


class Part(NamedTuple):
    """Commands that are run one after another until one fails, and the seconds they may take together.

    :param apart: no command needs another: all are run, and those that ended well are not run again.
    """

    what: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    apart: bool = False


OUT = "{out}"
"""Stands for the folder of the results in a command."""


def _benchmark(*args: str) -> tuple[str, ...]:
    return ("scripts/benchmark.py", *args)


def _measure(*args: str) -> tuple[str, ...]:
    return _benchmark(*args, "--missing", "--out", OUT)


def _tests(chosen: str) -> tuple[str, ...]:
    # Most of their time kernels are compiled, on the CPU.
    in_parallel = ("-n", "auto", "--maxprocesses", "8", "--dist", "load")
    return ("-m", "pytest", "tests/gpu", "-q", *in_parallel, "-k", chosen)


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

PARTS = {
    "gate": Part("every mask once against the float64 reference", 180, (_tests("gate"),)),
    "attention-quick": Part("attention at three settings", 360, (_measure("attention", "--quick"),)),
    "training-quick": Part("steps at the paper's settings", 1200, (_measure("training", "--quick", "--limit", "180"),)),
    "tests": Part(
        "the kernels against the float64 reference",
        1200,
        (_tests("not gate and not draw"), *(_tests(f"draw{n}") for n in range(4))),
        apart=True,
    ),
    "loss": Part(
        "the quickstart's loss curve with impl=triton, beside the reference's",
        480,
        (
            ("scripts/quickstart_corpus.py", "data/quickstart/corpus"),
            ("scripts/prepare_data.py", "--config", "configs/data/quickstart.yaml"),
            *(_train(folder, *overrides) for folder, overrides in _CURVES.items()),
            ("-m", "benchmarks.loss_curves", *_CURVES, "--out", OUT),
        ),
    ),
    "attention": Part("attention at every setting", 3600, (_measure("attention"),)),
    "training": Part("steps of both models at every length", 7200, (_measure("training"),)),
    "tune": Part(
        "tile sizes",
        1800,
        tuple(
            _benchmark("tune", "--setting", "8x16x4096", "--pattern", name, "--kernel", kernel)
            for name in ("exclusive", "sharing")
            for kernel in ("forward", "dq", "dkdv")
        ),
        apart=True,
    ),
}
"""In the order of what one wants to know first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--minutes", type=float, help="stop after so long; run again to resume")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results; default: benchmarks/results/<gpu>")
    parser.add_argument("--again", action="store_true", help="also the parts that ended well at this commit")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")


def run(args: argparse.Namespace) -> int:
    """Run parts. 0 if all of them have ended well."""
    parts = {name: PARTS[name] for name in PARTS if name in args.parts}
    if args.dry_run:
        for name, part in parts.items():
            print(f"{name}: {part.what}, at most {part.seconds // 60} minutes")
            for command in part.commands:
                print("  python", shlex.join(_with_folder(command, args.out or Path(machine.RESULTS, "<gpu>"))))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --dry-run prints what would be run on one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is running ends with this
    folder = (args.out or machine.results_folder("cuda")).resolve()
    return session(parts, folder, minutes=args.minutes, again=args.again)


def session(parts: Mapping[str, Part], folder: Path, *, minutes: float | None = None, again: bool = False) -> int:
    """Run parts, their output into ``folder/<part>.log`` and how they ended into ``folder/session.json``.

    :returns: 0 if all parts have ended well, now or before; 1 otherwise.
    """
    print(f"results go to {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "session.json"
    ended: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    here = machine.describe(machine.default_device())
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    for name, part in parts.items():
        before = ended.get(name, {})
        known = bool(before) and machine.same_setup(before["machine"], here) and not again
        if known and before["ended"] == "well":
            print(f"{name}: done on {before['machine']['date']}")
            continue
        left = end - time.monotonic()
        if left <= 0:
            print(f"{name}: not begun, the {minutes:g} minutes are over")
            continue
        print(f"{name}: {part.what} ...", flush=True)
        start = time.monotonic()
        part = part._replace(commands=tuple(_with_folder(command, folder) for command in part.commands))
        done = list(before.get("done", [])) if known else []
        for how in _run(part, done, folder / f"{name}.log", min(part.seconds, left)):
            seconds = round(time.monotonic() - start, 1)
            commands = [list(command) for command in part.commands]
            ended[name] = {"ended": how, "seconds": seconds, "commands": commands, "done": done, "machine": here}
            machine.write_json(record, ended)
        print(f"{name}: ended {how} after {seconds:.0f} s; see {folder / name}.log", flush=True)
    return 0 if all(ended.get(name, {}).get("ended") == "well" for name in parts) else 1


def _with_folder(command: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    return tuple(relative(folder) if word == OUT else word for word in command)


def _run(part: Part, done: list[list[str]], output: Path, seconds: float) -> Iterator[str]:
    """How a part stands after every command; at last how it ended: ``well``, or why it did not.

    :param done: commands that need not be run again, to which those of a part whose commands are apart are added.
    """
    end, failed = time.monotonic() + seconds, ""
    with output.open("a" if done else "w") as file:
        for command in part.commands:
            if list(command) in done:
                continue
            yield failed or "before its last command"
            print("$ python", *command, file=file, flush=True)
            try:
                left = max(end - time.monotonic(), 0.1)
                python = [sys.executable, *command]
                code = limited.run(python, left, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
            except subprocess.TimeoutExpired:
                yield f"by its limit of {seconds:.0f} s"
                return
            if code:
                failed = failed or f"with exit status {code} of python {' '.join(command)}"
                if not part.apart:
                    break
            elif part.apart:
                done.append(list(command))
    yield failed or "well"
