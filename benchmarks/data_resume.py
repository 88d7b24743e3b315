"""Kill data preparation at random moments and compare what comes out.

    python scripts/benchmark.py data_resume benchmarks/data_trial.yaml FOLDER

The corpus is prepared once undisturbed, then again in a process that is killed with SIGKILL and started anew until it
gets through. Every file of the two folders must be equal, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.usage import Usage
from spattn_olmoe import machine

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


def prepare(config: str, output: Path, kill_after: float | None = None) -> tuple[float, int] | None:
    """Seconds that the preparation took, and MiB at its peak; None where it was killed first."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, SCRIPT, "--config", config, f"output={output}"])
    usage = Usage(process.pid)
    try:
        status = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None
    finally:
        usage.stop()
    if status:
        raise SystemExit(f"prepare_data.py failed with status {status}")
    return time.monotonic() - begun, usage.mib


def documents_done(output: Path) -> int:
    """What the last checkpoint says."""
    try:
        progress = json.loads((output / "progress.json").read_bytes())["progress"]
    except FileNotFoundError:
        return 0
    return sum(source["documents"] for source in progress["sources"])


def differences(a: Path, b: Path) -> list[str]:
    """Files that are not the same in both folders."""
    names = {p.relative_to(folder) for folder in (a, b) for p in folder.rglob("*") if p.is_file()}
    return sorted(
        str(n)
        for n in names
        if not ((a / n).is_file() and (b / n).is_file() and (a / n).read_bytes() == (b / n).read_bytes())
    )


def trial(config: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """One straight run, one with kills."""
    straight = prepare(config, folder / "straight")
    assert straight is not None
    seconds, mib = straight
    chance = random.Random(seed)
    killed: list[dict[str, float]] = []
    while len(killed) < kills:
        after = chance.uniform(0.5, 1.4 * seconds / kills)
        if prepare(config, folder / "killed", after) is not None:
            break
        killed.append({"after_seconds": round(after, 2), "documents_kept": documents_done(folder / "killed")})
        print(killed[-1], flush=True)
    last = prepare(config, folder / "killed")
    assert last is not None
    manifest = json.loads((folder / "straight" / "manifest.json").read_bytes())
    return {
        "straight_seconds": round(seconds, 1),
        "straight_peak_memory_mib": mib,
        "kills": killed,
        "last_run_seconds": round(last[0], 1),
        "statistics": manifest["statistics"],
        "files": [file for source in manifest["options"]["sources"] for file in source["files"]],
        "shards": len(manifest["shards"]),
        "different_files": differences(folder / "straight", folder / "killed"),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_kills(parser, 10, "data_resume.json")


def run(args: argparse.Namespace) -> int:
    args.folder.mkdir(parents=True)
    record = machine.describe("cpu")
    record["result"] = trial(args.config, args.folder, args.kills, args.seed)
    machine.write_json(args.results, record)
    if different := record["result"]["different_files"]:
        raise ValueError(f"{len(record['result']['kills'])} kills: these files differ: {', '.join(different)}")
    print(f"{len(record['result']['kills'])} kills: every file is identical")
    return 0
