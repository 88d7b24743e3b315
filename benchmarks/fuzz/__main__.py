"""Inputs that nobody means, for every script and every kind of file. The tests run some of them.

python -m benchmarks.fuzz --inputs 1600 --out benchmarks/results/cpu/fuzz.json
python -m benchmarks.fuzz --only 713      # one input again, with what it printed
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from spattn_olmoe import machine
from spattn_olmoe.errors import real, whole

from . import cases, guard
from .material import Material, preload


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=whole(1, 10**9), default=1600)
    parser.add_argument(
        "--minutes", type=real(0, 1e6), default=1e6, help="stop after so long, and write what was found"
    )
    parser.add_argument("--first", type=whole(0, 10**9), default=0, help="the number of the first input")
    parser.add_argument("--only", type=whole(0, 10**9), nargs="*", help="these inputs alone, and what they print")
    parser.add_argument("--out", help="a file for the result, .json")
    args = parser.parse_args()
    numbers = args.only if args.only is not None else range(args.first, args.first + args.inputs)
    with tempfile.TemporaryDirectory() as work:
        material = Material.make(Path(work))
        preload()
        ends: dict[int, guard.End] = {}
        commands: dict[int, list[str]] = {}
        end = time.monotonic() + 60 * args.minutes
        for number in numbers:
            if ends and time.monotonic() > end:
                break
            folder = Path(work) / f"input{number}"
            commands[number] = cases.make(number, material, folder)
            ends[number] = guard.run(commands[number], folder)
            shutil.rmtree(folder, ignore_errors=True)
            if ends[number].fault or args.only is not None:
                print(number, *map(repr, commands[number]), ends[number].fault, ends[number].output[-2000:], flush=True)
    kinds = Counter(end.kind for end in ends.values())
    by_script: dict[str, Counter[str]] = {}
    for number, end in ends.items():
        by_script.setdefault(commands[number][0], Counter())[end.kind] += 1
    print(dict(kinds))
    if args.out:
        write(args.out, ends, kinds, by_script, commands)
    return int(any(end.fault for end in ends.values()))


def write(
    out: str,
    ends: dict[int, guard.End],
    kinds: Counter[str],
    by_script: dict[str, Counter[str]],
    commands: dict[int, list[str]],
) -> None:
    """The result file: how many inputs ended how, the slowest and the largest, and every fault."""
    results = {
        "machine": machine.describe("cpu"),
        "inputs": len(ends),
        "first": min(ends),
        "ends": dict(kinds),
        "by_script": {script: dict(counts) for script, counts in sorted(by_script.items())},
        "seconds": {
            script: round(sum(e.seconds for n, e in ends.items() if commands[n][0] == script), 1)
            for script in by_script
        },
        "most_seconds": max(end.seconds for end in ends.values()),
        "most_megabytes": max(end.megabytes for end in ends.values()),
        "faults": [
            {"input": number, "command": " ".join(commands[number])[:300], "fault": end.fault}
            for number, end in ends.items()
            if end.fault
        ],
    }
    machine.write_json(Path(out), results)


if __name__ == "__main__":
    sys.exit(main())
