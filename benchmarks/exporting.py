"""Memory and time of ``import_hf.py`` and ``export_hf.py`` on layers of 1B-7B: is it that of one layer, however many there are?

    python scripts/benchmark.py exporting FOLDER

Random weights in the published layout, in bfloat16 as published, come in and go out again, at several depths. Peaks are
those of the commands' own processes, above one that only imports the same modules. ``allocated`` memory is theirs alone;
``resident`` counts the pages of files that they map too, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from spattn_olmoe import machine
from spattn_olmoe.commands import environment, script_command
from spattn_olmoe.errors import whole
from spattn_olmoe.model.hf.config import hf_config
from spattn_olmoe.model.hf.export import Published, write_weights
from spattn_olmoe.model.hf.weights import Shape, same_bits, split
from spattn_olmoe.train import load_experiment

from .tiny import EOS, PAD, write_data

CONFIG, DTYPE = "configs/1b7b_standard.yaml", torch.bfloat16
IMPORTS = "import transformers, spattn_olmoe.model.hf.importing, spattn_olmoe.paper.masks, spattn_olmoe.train.config"
GB, INTERVAL = 1e9, 0.01  # seconds between two looks


def overrides(n_layers: int) -> list[str]:
    return [
        f"model.n_layers={n_layers}",
        f"dataset.tokenizer.eos_token_id={EOS}",
        f"dataset.tokenizer.pad_token_id={PAD}",
    ]


def write_published(folder: Path, n_layers: int) -> dict[str, int]:
    """A random "published" model of so many layers. Returns its bytes, and those of one layer."""
    experiment = load_experiment(CONFIG, overrides(n_layers))
    model, length = experiment.model_with_attention(), experiment.sequence_length
    config = hf_config(model, max_length=length, eos_token_id=EOS, pad_token_id=PAD, dtype="bfloat16")
    shape, generator = Shape.of(config), torch.Generator().manual_seed(0)
    folder.mkdir()
    write_weights(folder, shape, lambda name: torch.randn(shape.core()[name], dtype=DTYPE, generator=generator), DTYPE)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(write_data(folder.parent / "data") / "tokenizer.json", folder)
    sizes = {name: torch.Size(size).numel() * DTYPE.itemsize for name, size in shape.core().items()}
    return {
        "bytes": sum(sizes.values()),
        "layer_bytes": sum(n for name, n in sizes.items() if split(name)[0]) // n_layers,
    }


def watch(command: list[str]) -> dict[str, float]:
    """The most bytes of memory that a process had, and its seconds.

    :raises ValueError: it failed.
    """
    begun, most = time.perf_counter(), {"allocated": 0, "resident": 0}
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as child:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            found = dict(line.split(":", 1) for line in status.read_text().splitlines())
            for name, key in (("allocated", "RssAnon"), ("resident", "VmRSS")):
                most[name] = max(most[name], 1024 * int(found.get(key, "0").split()[0]))  # an ended one has none
            time.sleep(INTERVAL)
    if child.returncode:
        raise ValueError(f"exit code {child.returncode}: {' '.join(command)}")
    return {**most, "seconds": time.perf_counter() - begun}


def measure(folder: Path, n_layers: int, bare: dict[str, float]) -> dict[str, Any]:
    """One depth: what both commands took, above ``bare``."""
    published, checkpoint, again = (folder / name for name in ("published", "imported", "exported"))
    row: dict[str, Any] = {"layers": n_layers, **write_published(published, n_layers)}
    to_import = ["--from", str(published), "--to", str(checkpoint), "--config", CONFIG, *overrides(n_layers)]
    to_export = ["--checkpoint", str(checkpoint), "--to", str(again), "--dtype", "bfloat16"]
    for name, arguments in (("import", to_import), ("export", to_export)):
        found = watch(script_command(f"{name}_hf", arguments, to_run=True))
        row[name] = found | {key: found[key] - bare[key] for key in ("allocated", "resident")}
        print(f"layers: {n_layers}, each {row['layer_bytes'] / GB:.2f} GB, {name}: {in_words(row[name])}", flush=True)
    a, b = Published(published), Published(again)
    row["bit_for_bit"] = a.shapes == b.shapes and all(same_bits(a.read(name), b.read(name)) for name in a.shapes)
    return row


def in_words(found: dict[str, float]) -> str:
    """What one command took."""
    memory = f"{found['allocated'] / GB:.2f} GB allocated, {found['resident'] / GB:.2f} GB resident"
    return f"{memory}, {found['seconds']:.0f} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="for the weights, 11 GB; must not exist, and is removed at the end")
    parser.add_argument("--layers", type=whole(1, 1000), nargs="+", default=[1, 4], help="default: 1 4")
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / "exporting.json")


def run(args: argparse.Namespace) -> int:
    record = machine.describe("cpu")
    record["bare"] = watch([sys.executable, "-c", IMPORTS])
    record["rows"] = []
    for n_layers in args.layers:
        args.folder.mkdir(parents=True)
        try:
            record["rows"].append(measure(args.folder, n_layers, record["bare"]))
        finally:
            shutil.rmtree(args.folder)
        machine.write_json(args.results, record)
    if not all(row["bit_for_bit"] for row in record["rows"]):
        raise ValueError(f"what went out is not what came in: see {args.results}")
    return 0
