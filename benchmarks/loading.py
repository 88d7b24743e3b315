"""What it costs to open a checkpoint safely: OLMo-core's own loading against this package's, in turns.

    python scripts/benchmark.py loading configs/0p25b1p75b_spattn.yaml FOLDER model.n_layers=4

A checkpoint of random weights in float32 is written and loaded into the same model again and again: as OLMo-core does it
(which unpickles whatever is there), with the readers that run no code, and with the look for weights that are not
finite on top. Checksums are timed too, by themselves: OLMo-core has none. Files are in the page cache throughout, and
the ratios are of processor time, so that what is compared is work, neither the disk nor what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.checkpoint import (
    RemoteFileSystemReader,
    filesystem,
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from olmo_core.train import checkpoint

from spattn_olmoe import machine
from spattn_olmoe.errors import whole
from spattn_olmoe.model.checkpoint_files import find_damage, write_checksums
from spattn_olmoe.model.finite import first_non_finite
from spattn_olmoe.model.remedies import unpickling
from spattn_olmoe.train import load_experiment


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """OLMo-core's readers as they come."""
    kept = filesystem.pickle, filesystem.torch, checkpoint.torch, RemoteFileSystemReader.read_data
    filesystem.pickle, filesystem.torch, checkpoint.torch = pickle, torch, torch
    RemoteFileSystemReader.read_data = unpickling._stock_read_data  # type: ignore[method-assign]
    try:
        yield
    finally:
        filesystem.pickle, filesystem.torch, checkpoint.torch, RemoteFileSystemReader.read_data = kept  # type: ignore[method-assign]


def measure(model: torch.nn.Module, folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Processor and wall-clock seconds of every way of loading, round by round, after one that is not counted."""
    weights = folder / "model_and_optim"

    def plain() -> None:
        with stock():
            load_model_and_optim_state(weights, model)

    def finite() -> None:
        assert first_non_finite(model.named_parameters()) is None

    ways: dict[str, Callable[[], Any]] = {
        "olmo_core": plain,
        "safe": lambda: load_model_and_optim_state(weights, model),
        "finite": finite,
        "checksums": lambda: find_damage(str(folder)),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for n in range(rounds + 1):
        names = list(ways)[:2]
        for name in [*(names if n % 2 else reversed(names)), "finite", *(["checksums"] if n < 3 else [])]:
            begun = time.process_time(), time.perf_counter()
            ways[name]()
            if n:
                seconds[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
        print({name: f"{own[-1][0]:.2f}" for name, own in seconds.items() if own}, flush=True)
    return seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("folder", type=Path, help="for the checkpoint; must not exist, and is removed at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=whole(3, 1000), default=10)
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / "loading.json")


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model = load_experiment(args.config, args.overrides).model_with_attention().build(init_device="cpu")
    args.folder.mkdir(parents=True)
    try:
        unpickling.apply()
        save_model_and_optim_state(args.folder / "model_and_optim", model)
        write_checksums(args.folder, rank=0, ranks=1)
        size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
        seconds = measure(model, args.folder, args.rounds)
    finally:
        shutil.rmtree(args.folder)
    cpu = {name: [processor for processor, _ in own] for name, own in seconds.items()}
    safe = [b / a for a, b in zip(cpu["olmo_core"], cpu["safe"], strict=True)]
    finite = [(b + c) / a for a, b, c in zip(cpu["olmo_core"], cpu["safe"], cpu["finite"], strict=True)]
    record = machine.describe("cpu")
    record["result"] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": size,
        "cpu_seconds": cpu,
        "seconds": {name: [wall for _, wall in own] for name, own in seconds.items()},
        "least_cpu_seconds": {name: min(own) for name, own in cpu.items()},
        "median_ratio": {"safe": statistics.median(safe), "safe_and_finite": statistics.median(finite)},
    }
    machine.write_json(args.results, record)
    print(record["result"]["least_cpu_seconds"], record["result"]["median_ratio"])
    return 0
