"""Checks of one machine. Each is a function of the experiment that returns rows; none changes anything but a temporary file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import netrc
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.io import is_url
from olmo_core.train.callbacks import CheckpointerCallback
from packaging.requirements import Requirement

from ..model.remedies import TESTED_RELEASE
from ..train.config import ExperimentConfig
from ..train.layout import Layout
from ..train.shards import check_data, data_files
from ..train.wandb import WandB
from .memory import USABLE, checkpoint_bytes, memory

OK, WARN, FAIL = "ok", "warn", "fail"

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
CHECKED_PACKAGES = ("torch", "numpy", "triton", "omegaconf", "tokenizers", "wandb")

MIN_OPEN_FILES = 4096
MIN_SHARED_MEMORY = 2**30
MIN_SHARED_MEMORY_FREE = 0.05
"""Of its size: less is left where earlier jobs did not clean up."""
MIN_HOST_MEMORY = 8 * 10**9
SLOW_SAVE = 300
"""Seconds that writing a checkpoint may take."""
PROBE = 256 * 2**20
"""Bytes that are written to measure the save folder's speed."""
PATIENCE = 20.0
"""Seconds that nvidia-smi may take; it hangs where the driver has lost a GPU."""
LOOK_AT_IT = "dmesg | grep Xid names the GPU; have the node looked at"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    :param status: :data:`OK`, :data:`WARN` (a run works, but look) or :data:`FAIL` (it will not).
    :param found: what is there. :param remedy: what to do, where the status is not :data:`OK`.
    """

    name: str
    status: str
    found: str
    remedy: str = ""


def check_node(config: ExperimentConfig, ranks: int, nodes: int) -> list[Row]:
    """All checks of this machine. One that breaks on it is a failure: the others, and other machines, have to know.

    :param ranks: processes of the whole job; ``nodes``: its machines.
    """
    rows: list[Row] = []
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        "packages": versions,
        "GPU": lambda: gpus(config, ranks, nodes),
        "GPU clocks, ECC": gpu_health,
        "network": lambda: interconnect(nodes),
        "save folder": lambda: save_folder(config, nodes),
        "data": lambda: data(config),
        "wandb": lambda: wandb(config),
        "system": lambda: system(config),
    }
    for name, check in checks.items():
        try:
            rows += check()
        except Exception as error:  # drivers and file systems break in many ways
            rows.append(broken(name, error))
    return rows


def broken(name: str, error: Exception) -> Row:
    """The row of a check that an error ended."""
    reason = str(error).strip().splitlines() or [""]
    return Row(name, FAIL, f"{type(error).__name__}: {reason[0]}", LOOK_AT_IT if "GPU" in name else "look at this node")


def versions() -> Iterator[Row]:
    """Python and packages against the versions that were tested."""
    supported = sys.version_info >= (3, 10)
    yield Row("Python", OK if supported else FAIL, platform.python_version(), "" if supported else "3.10 or newer")
    olmo = importlib.metadata.version("ai2-olmo-core")
    right = olmo == TESTED_RELEASE
    yield Row("OLMo-core", OK if right else FAIL, olmo, "" if right else f"pip install ai2-olmo-core=={TESTED_RELEASE}")
    if not CONSTRAINTS.is_file():
        yield Row("packages", WARN, "constraints.txt is not there to compare with", "run from a checkout")
        return
    tested = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    differ = []
    for requirement in tested:
        if requirement.name not in CHECKED_PACKAGES or (requirement.marker and not requirement.marker.evaluate()):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # what must be there has rows of its own
        if not requirement.specifier.contains(found.split("+")[0]):
            differ.append(f"{requirement.name} {found} (tested: {requirement.specifier})")
    yield Row(
        "packages",
        WARN if differ else OK,
        "; ".join(differ) or f"torch {torch.__version__}, as tested",
        "pip install -c constraints.txt -e ." if differ else "",
    )


def gpus(config: ExperimentConfig, ranks: int, nodes: int) -> Iterator[Row]:
    """GPUs, one a local process, and whether the config fits their memory."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "PyTorch is built without CUDA" if built is None else "PyTorch sees none: is the driver loaded?"
        yield Row("GPU", WARN, f"none; {why}", "on a CPU only the quickstart's size is practical")
        return
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    enough = count >= local
    yield Row("GPU", OK if enough else FAIL, f"{count} x {name}", "" if enough else f"{local} processes need {local}")
    versions = f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield Row("driver", OK, f"{_query_gpus('driver_version')[0][0]}; {versions}" if _smi() else versions)
    try:
        needed = memory(config, Layout.of(config, ranks, nodes)).peak
    except ValueError as error:
        yield Row("GPU memory", WARN, f"not estimated: {error}", "watch the first steps")
        return
    there = torch.cuda.get_device_properties(0).total_memory * USABLE
    fits = needed <= there
    yield Row(
        "GPU memory",
        OK if fits else FAIL,
        f"{needed / 1e9:.1f} GB estimated of {there / 1e9:.1f} GB",
        "" if fits else "take the layout that scripts/plan.py proposes",
    )


def gpu_health() -> Iterator[Row]:
    """Clocks, throttling and memory errors, as the driver reports them."""
    if not _smi():
        return
    bad = []
    for index, (throttled, errors, now, top) in enumerate(
        _query_gpus("clocks_throttle_reasons.active,ecc.errors.uncorrected.volatile.total,clocks.sm,clocks.max.sm")
    ):
        reasons = int(throttled, 16) & ~0b11 if throttled.startswith("0x") else 0  # idle and set clocks are no fault
        if reasons:
            bad.append(f"GPU {index} is throttled ({throttled}, {now} of {top} MHz)")
        if errors.isdigit() and int(errors):
            bad.append(f"GPU {index} has {errors} uncorrected memory errors")
    yield Row(
        "GPU clocks, ECC",
        WARN if bad else OK,
        "; ".join(bad) or "no throttling, no uncorrected errors",
        "nvidia-smi -q -d PERFORMANCE,ECC; have the node looked at" if bad else "",
    )


def interconnect(nodes: int) -> Iterator[Row]:
    """NVLink inside the node and InfiniBand between nodes."""
    adapters = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    active = [a.parts[-4] for a in adapters if "ACTIVE" in a.read_text()]
    if nodes > 1:
        there = f"active InfiniBand or RoCE adapters: {', '.join(active) or 'none'}"
        yield Row(
            "network",
            OK if active else WARN,
            there,
            "" if active else "traffic between nodes goes over TCP: expect it to be slow; see NCCL_SOCKET_IFNAME",
        )
    if _smi() and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        linked = "NV" in _nvidia_smi("topo", "-m").split("Legend")[0].replace("NVIDIA", "")
        yield Row(
            "NVLink", OK if linked else WARN, "yes" if linked else "no", "" if linked else "GPUs talk over PCIe: slow"
        )


def save_folder(config: ExperimentConfig, nodes: int) -> Iterator[Row]:
    """Whether the save folder can be written, how fast, and whether the checkpoints fit."""
    folder = config.trainer.save_folder
    if is_url(folder):
        yield Row("save folder", WARN, f"{folder} is a URL: not measured", "see that this node may write there")
        return
    existing = next(p for p in (Path(folder).resolve(), *Path(folder).resolve().parents) if p.exists())
    try:
        speed = write_speed(existing)
    except OSError as error:
        yield Row(
            "save folder", FAIL, f"{existing}: {error.strerror}", "set trainer.save_folder to a folder you may write"
        )
        return
    try:
        size = checkpoint_bytes(config)
    except ValueError:
        size = 12.0 * config.model_with_attention().num_params
    kept = checkpoints_kept(config)
    free, needed = shutil.disk_usage(existing).free, size * kept
    enough = free >= needed
    yield Row(
        "disk space",
        OK if enough else WARN if free >= 2 * size else FAIL,
        f"{_size(free)} free in {existing}; {kept} checkpoints of {_size(size)} will take {_size(needed)}",
        "" if enough else "free some, or set trainer.callbacks.checkpointer.max_checkpoints",
    )
    seconds = size / nodes / speed
    fast = seconds <= SLOW_SAVE
    yield Row(
        "disk speed",
        OK if fast else WARN,
        f"{speed / 1e6:,.0f} MB/s written; this node's share of a checkpoint takes {seconds:,.0f} s",
        "" if fast else "trainer.callbacks.checkpointer.save_async=true, or a faster file system",
    )


def write_speed(folder: Path) -> float:
    """Bytes a second that reach the disk."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".check_env-") as file:
        start = time.perf_counter()
        for _ in range(PROBE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - start)


def checkpoints_kept(config: ExperimentConfig) -> int:
    """How many checkpoints a run leaves at most: permanent ones, and one ephemeral."""
    for callback in config.trainer.callbacks.values():
        if isinstance(callback, CheckpointerCallback) and callback.enabled:
            if callback.max_checkpoints is not None:
                return callback.max_checkpoints + 1
            duration, interval = config.trainer.max_duration, callback.save_interval
            steps = (
                duration.value if duration.unit == "steps" else duration.value // config.data_loader.global_batch_size
            )
            return steps // interval + 2 if duration.unit != "epochs" and interval else 2
    return 1


def data(config: ExperimentConfig) -> Iterator[Row]:
    """Whether the data are there and agree with the config: what a run checks before its first step."""
    try:
        files = data_files(config.dataset)
        check_data(config)
    except (ValueError, OLMoConfigurationError) as error:
        yield Row(
            "data", FAIL, " ".join(str(error).split()), "python scripts/prepare_data.py --config configs/data/..."
        )
        return
    local = [Path(f) for f in files if not is_url(f)]
    size = sum(f.stat().st_size for f in local)
    yield Row("data", OK, f"{len(files)} files, {_size(size)}; the manifest fits the config")


def wandb(config: ExperimentConfig) -> Iterator[Row]:
    """Whether Weights & Biases would log online. It never stops a run, so this never fails."""
    callbacks = [c for c in config.trainer.callbacks.values() if isinstance(c, WandB)]
    if not callbacks or not callbacks[0].enabled or callbacks[0].mode == "disabled":
        yield Row("wandb", OK, "off in the config")
        return
    if importlib.util.find_spec("wandb") is None:
        yield Row("wandb", WARN, "not installed: metrics go to metrics.jsonl only", "pip install wandb")
        return
    if callbacks[0].mode == "offline":
        yield Row("wandb", OK, "offline, as configured")
        return
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = address.hostname or "", address.port or 443
    if not os.environ.get("WANDB_API_KEY"):
        elsewhere = " (there is one in ~/.netrc, which a run does not look at)" if _in_netrc(host) else ""
        yield Row("wandb", WARN, f"WANDB_API_KEY is not set{elsewhere}: it logs offline", "export WANDB_API_KEY=...")
        return
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        yield Row("wandb", WARN, f"{host} cannot be reached: {error}", "trainer.callbacks.wandb.mode=offline")
        return
    yield Row("wandb", OK, f"key set, {host} answers")


def system(config: ExperimentConfig) -> Iterator[Row]:
    """Limits of the operating system that end runs."""
    workers = config.data_loader.num_workers
    size, _, free = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else (0, 0, 0)
    enough = size >= MIN_SHARED_MEMORY or workers == 0
    if size and free < size * MIN_SHARED_MEMORY_FREE:
        yield Row(
            "shared memory",
            FAIL,
            f"{free / 2**20:,.0f} of {size / 2**20:,.0f} MiB free in /dev/shm",
            "files of ended jobs: ls -l /dev/shm, and delete them",
        )
        return
    yield Row(
        "shared memory",
        OK if enough else FAIL,
        f"{size / 2**30:.1f} GiB in /dev/shm for {workers} data workers a process",
        "" if enough else "docker run --shm-size=16g, a memory volume on /dev/shm in Kubernetes, or num_workers=0",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= MIN_OPEN_FILES or soft == resource.RLIM_INFINITY
    allowed = MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    remedy = (
        f"ulimit -n {allowed}"
        if allowed > soft
        else "a higher hard limit: limits.conf, LimitNOFILE of slurmd, --ulimit"
    )
    yield Row("open files", OK if enough else WARN, f"{soft:,} (hard limit {hard:,})", "" if enough else remedy)
    if (meminfo := Path("/proc/meminfo")).is_file():
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines()}
        free, enough = sizes["MemAvailable"], sizes["MemAvailable"] > MIN_HOST_MEMORY
        yield Row(
            "host memory",
            OK if enough else WARN,
            f"{free / 1e9:,.0f} of {sizes['MemTotal'] / 1e9:,.0f} GB free",
            "" if enough else "checkpoints pass through it: free some",
        )
    steady = time.get_clock_info("monotonic").monotonic
    yield Row(
        "monotonic clock", OK if steady else FAIL, "yes" if steady else "no", "" if steady else "timeouts need one"
    )
    host = socket.gethostname()
    for name in dict.fromkeys((host, os.environ.get("MASTER_ADDR", host))):
        try:
            address = socket.getaddrinfo(name, None)[0][4][0]
        except OSError as error:
            yield Row("host name", FAIL, f"{name} does not resolve: {error}", f"add {name} to DNS or /etc/hosts")
        else:
            yield Row("host name", OK, f"{name} is {address}")


def _size(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _smi() -> bool:
    return shutil.which("nvidia-smi") is not None


def _query_gpus(query: str) -> list[list[str]]:
    """A query's values, a list a GPU."""
    output = _nvidia_smi(f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return [[value.strip() for value in line.split(",")] for line in output.splitlines()]


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints.

    :raises RuntimeError: it fails, with its own words, or hangs.
    """
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            ["nvidia-smi", *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and not waited for: inside the driver nothing can be killed
            raise RuntimeError(f"nvidia-smi does not answer within {PATIENCE:g} seconds") from None
        file.seek(0)
        output = file.read()
    if status != 0:
        raise RuntimeError(f"nvidia-smi fails with status {status}: {' '.join(output.split())}")
    return output
