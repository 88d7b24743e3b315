"""Training steps: dense attention at its fastest against SPAttention, exclusive bands and with local sharing.

    python scripts/benchmark.py training                     # on a GPU 1b7b and 0p25b1p75b, on a CPU the quickstart's model
    python scripts/benchmark.py training --quick             # 0p25b1p75b at N=1024 (the model of Table 2), 1b7b at 4096
    python scripts/benchmark.py training --missing           # only what the result file does not have yet, of this commit
    python scripts/benchmark.py training --report            # only the table and the plot, from the stored results

Every setup runs in a process of its own. One that does not fit into the GPU's memory is tried again with half the layers,
for all masks of the setting, and the result states it. Results are stored after every setup.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, TimeoutExpired
from typing import Any, NamedTuple

import torch

from benchmarks import arguments, limited, report
from benchmarks.attention import Store
from benchmarks.training_step import Job
from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT
from spattn_olmoe.patterns import find_variant

log = logging.getLogger(__name__)


class Setting(NamedTuple):
    """A model at a length, compiled or not; measured under every mask, with as many layers."""

    model: str
    N: int
    compiled: bool

    def __str__(self) -> str:
        return f"{self.model} N{self.N}{' compiled' if self.compiled else ''}"


CONFIGS = {
    "0p25b1p75b": "0p25b1p75b_standard.yaml",
    "1b7b": "1b7b_standard.yaml",
    "table2": "table2_standard.yaml",
    "quickstart": "quickstart.yaml",
}
FILE = "training.json"
MASKS = ("dense", "exclusive", "sharing")
"""What is compared unless asked otherwise."""
GPU_LENGTHS, CPU_LENGTHS = (1024, 4096, 16384, 65536), (512, 1024)
TOKENS = {"cuda": 16384, "cpu": 2048}
"""Tokens of a microbatch, or one sequence where that is longer."""
MICROBATCHES, STEPS = {"cuda": 4, "cpu": 1}, {"cuda": 8, "cpu": 5}
STATE = 16  # bytes a parameter: weight, gradient and Adam's moments in float32
STATE_SHARE = 0.8  # of the GPU's memory, at most, before anything else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=CONFIGS, help="default: 0p25b1p75b 1b7b, on a CPU quickstart")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="default: 1024 4096 16384 65536")
    parser.add_argument("--compile", choices=("on", "off", "both"), help="default: both, on a CPU off")
    parser.add_argument("--quick", action="store_true", help="the paper's two settings, not compiled and compiled")
    arguments.add_patterns(parser, MASKS)
    parser.add_argument("--steps", type=int, help="timed steps, default 8, on a CPU 5")
    parser.add_argument("--limit", type=float, default=300, metavar="S", help="seconds for one setup; default 300")
    arguments.add_measuring(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, store, and write table and plot. 1 if no setting could be measured."""
    device = args.device or machine.default_device()
    folder = args.out or machine.results_folder(device)
    done = True
    if not args.report:
        settings = _settings(args, device)
        if device == "cpu":
            print("No GPU: this times the quickstart's model, some 2 M parameters, on the CPU.")
        store = Store(folder / FILE, machine.describe(device, args.note))
        if args.missing:
            stored = {(row["setting"], row["attention"]) for row in store.good_rows()}
            settings = [s for s in settings if not all((str(s), mask) in stored for mask in args.patterns)]
        done = measure(settings, store, device, steps=args.steps, limit=args.limit, masks=args.patterns)
    for file in report.write(folder / FILE, report.training_markdown, report.training_plot):
        print(f"wrote {file}")
    return 0 if done else 1


def _settings(args: argparse.Namespace, device: str) -> list[Setting]:
    if any(N < 1 for N in args.lengths or ()) or (args.steps is not None and args.steps < 1):
        raise ValueError("--lengths and --steps must be at least 1")
    chosen = args.compile or ("both" if device == "cuda" else "off")
    compiled = {"on": (True,), "off": (False,), "both": (False, True)}[chosen]
    if args.quick:
        pairs: Iterable[tuple[str, int]] = [("0p25b1p75b", 1024), ("1b7b", 4096)]
    else:
        models = args.models or (["0p25b1p75b", "1b7b"] if device == "cuda" else ["quickstart"])
        pairs = [(m, N) for N in args.lengths or (GPU_LENGTHS if device == "cuda" else CPU_LENGTHS) for m in models]
    return [Setting(model, N, on) for model, N in pairs for on in compiled]


def measure(
    settings: Sequence[Setting],
    store: Store,
    device: str,
    *,
    steps: int | None = None,
    limit: float = 300,
    masks: Sequence[str] = MASKS,
) -> bool:
    """Measure settings and store them, each mask as soon as it is measured; what is stored of other settings is kept.

    :param limit: seconds that one setup may take.
    :param masks: by name; ratios are taken to ``dense``.
    :returns: whether every setting has a time for every mask.
    """
    complete = True
    for setting in settings:
        for rows in _measure_setting(setting, device, steps or STEPS[device], limit, masks):
            store.add(setting, rows)
        complete &= all("error" not in row for row in rows)
        report.print_setting(setting, report.training_lines(rows))
    return complete


def _measure_setting(
    setting: Setting, device: str, steps: int, limit: float, masks: Sequence[str] = MASKS
) -> Iterator[list[dict[str, Any]]]:
    """Rows of one setting so far, after each mask: all with the most layers of 1, 1/2, 1/4 ... of the model's that fit."""
    of_layers, layers = _layers_to_begin_with(setting, device)
    while True:
        rows = []
        for attention in masks:
            result = _run(_job(setting, attention, layers, device, steps), limit)
            known = {"setting": str(setting), **setting._asdict(), "attention": attention, "of_layers": of_layers}
            rows.append(known | result)
            if "out_of_memory" in result:
                break
            yield rows
        else:
            return
        if layers == 1:
            yield [row | {"error": row.get("error") or "out of memory with one layer"} for row in rows]
            return
        log.warning("%s: %d layers do not fit into memory; again with %d", setting, layers, layers // 2)
        layers //= 2


def _layers_to_begin_with(setting: Setting, device: str) -> tuple[int, int]:
    """The model's layers, and of these the most whose weights, gradients and moments leave memory for anything else."""
    from spattn_olmoe.train import load_experiment

    model = load_experiment(ROOT / "configs" / CONFIGS[setting.model]).model
    layers = model.n_layers
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        while layers > 1 and model.replace(n_layers=layers).num_params * STATE > STATE_SHARE * memory:
            layers //= 2
    return model.n_layers, layers


def _job(setting: Setting, attention: str, layers: int, device: str, steps: int) -> Job:
    compiled = str(setting.compiled).lower()
    overrides = (
        *find_variant(attention).overrides,
        f"model.n_layers={layers}",
        f"train_module.compile_model={compiled}",
    )
    sequences = max(1, TOKENS[device] // setting.N)
    return Job(CONFIGS[setting.model], setting.N, overrides, sequences, MICROBATCHES[device], steps, device)


def _run(job: Job, limit: float) -> dict[str, Any]:
    """The result of a job, in a process of its own, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "benchmarks.training_step", str(job_file), str(result_file)]
        try:
            done = limited.run(command, limit, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
        except TimeoutExpired:
            return {"error": f"took more than {limit:.0f} s"}
        if result_file.exists():
            return json.loads(result_file.read_text())
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"error": f"exit status {done.returncode}: {last[0][:300]}"}
