"""Checks that take several processes, and one table of all machines."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from olmo_core.exceptions import OLMoConfigurationError

from ..ranks import launched
from ..train.config import ExperimentConfig
from ..train.layout import check_layout
from ..train.run import check
from .node import FAIL, LOOK_AT_IT, OK, WARN, Row, broken, check_node

TIMEOUT = timedelta(seconds=300)
"""For the slowest machine's checks, and for NCCL."""
MAX_SKEW = 1.0
"""Seconds by which the clocks of machines may differ."""
ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""float32 elements of the all-reduce: 16 MiB, and 256 MiB on GPUs, where less does not show their bandwidth."""


@dataclass(frozen=True)
class Findings:
    """What the checks of a cluster found."""

    rows: list[Row]
    failed_nodes: list[str]
    """Machines with a failure of their own, where others have none: the job would run without them."""


def check_cluster(
    config: ExperimentConfig, min_bandwidth: float = 0.0, report: Callable[[Findings], None] | None = None
) -> Findings:
    """All checks, on every machine of a ``torchrun`` job, or on this one alone. Every rank gets all findings.

    :param min_bandwidth: a slower all-reduce between GPUs is a failure, in GB/s.
    :param report: called by the first rank, and waited for by all: where one process ends with a failure, launchers end
        the others.
    :raises DistStoreError, RuntimeError: the processes cannot reach each other at all.
    """
    ranks, nodes = launched()
    if "RANK" not in os.environ:
        rows = check_node(config, ranks, 1) + fits(config, ranks, nodes, alone=True) + [all_reduce_here()]
        found = Findings(merge([("", rows)]), [])
        if report is not None:
            report(found)
        return found
    # Over the network alone: a machine whose GPU is broken must be able to say so.
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        by_host = check_nodes(config, ranks, nodes)
        sound = not any(row.status == FAIL for _, rows in by_host for row in rows)
        rows = [*merge(by_host), *fits(config, ranks, nodes), all_reduce_together(min_bandwidth, sound), clock_skew()]
        found = Findings(rows, failed_nodes(by_host))
        if report is not None and dist.get_rank() == 0:
            report(found)
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


def check_nodes(config: ExperimentConfig, ranks: int, nodes: int) -> list[tuple[str, list[Row]]]:
    """Every machine's name and its own checks, on every rank."""
    local = ranks // nodes
    own = check_node(config, ranks, nodes) if os.environ["LOCAL_RANK"] == "0" else []
    own += own_gpu()
    host, sees_gpus = os.environ.get("SLURMD_NODENAME") or socket.gethostname(), torch.cuda.is_available()
    gathered: list[tuple[str, bool, list[Row]]] = [("", False, [])] * ranks
    dist.all_gather_object(gathered, (host, sees_gpus, own))
    by_host = []
    for first in range(0, ranks, local):
        name, sees, _ = gathered[first]
        rows = [row for _, _, found in gathered[first : first + local] for row in found]
        if not sees and any(others_do for _, others_do, _ in gathered):
            rows.append(Row("GPU", FAIL, "PyTorch sees none, where other machines have some", LOOK_AT_IT))
        by_host.append((name, rows))
    return by_host


def own_gpu() -> list[Row]:
    """A failure where this process cannot compute on its GPU. That there are too few of them, the machine's rows tell."""
    index = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return []
    try:
        torch.cuda.set_device(index)
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:
        return [broken(f"GPU {index}", error)]
    return []


def failed_nodes(by_host: list[tuple[str, list[Row]]]) -> list[str]:
    """The machines that fail a check, unless all of them do: that is not the fault of a machine."""
    failed = [host for host, rows in by_host if any(row.status == FAIL for row in rows)]
    return failed if len(failed) < len(by_host) else []


def fits(config: ExperimentConfig, ranks: int, nodes: int, alone: bool = False) -> list[Row]:
    """Whether the config is sound and its layout fits the number of processes."""
    try:
        check(config)
        if not alone or ranks > 1:
            check_layout(config, ranks, nodes)
    except (ValueError, OLMoConfigurationError) as error:
        return [Row("layout", FAIL, str(error), "python scripts/plan.py proposes one")]
    if alone:
        return [Row("layout", OK, "config is sound; its layout is checked under torchrun")]
    return [Row("layout", OK, f"fits {ranks} processes")]


def all_reduce_together(min_bandwidth: float, sound: bool) -> Row:
    """The all-reduce of a job, and what any of its ranks finds wrong with it.

    :param sound: no machine has failed: else NCCL might wait for a broken GPU, and what is known already would be lost.
    """
    if not sound:
        return Row("all-reduce", WARN, "not tried: a machine has failed", "see its rows")
    try:
        if torch.cuda.is_available():
            row = all_reduce(torch.device("cuda"), dist.new_group(backend="nccl", timeout=TIMEOUT), min_bandwidth)
        else:
            row = all_reduce(torch.device("cpu"), dist.group.WORLD)
    except Exception as error:  # the library's errors have no common type
        row = broken("all-reduce", error)
    gathered = [row] * dist.get_world_size()
    dist.all_gather_object(gathered, row)
    return next((row for row in gathered if row.status == FAIL), gathered[0])


def all_reduce(device: torch.device, group: dist.ProcessGroup | None, min_bandwidth: float = 0.0) -> Row:
    """A real all-reduce over all processes: is the sum right, and how fast was it?

    :param min_bandwidth: between GPUs, a bus bandwidth below it is a failure, in GB/s.
    """
    size = dist.get_world_size()
    x = torch.full((ELEMENTS[device.type],), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(x, group=group)  # the first one connects
    right = bool((x == size * (size + 1) / 2).all())
    seconds = min(_seconds(x, group) for _ in range(3))
    speed = 2 * (size - 1) / size * x.numel() * x.element_size() / seconds / 1e9
    found = f"{dist.get_backend(group)} over {size} processes, {speed:.2f} GB/s"
    if not right:
        return Row("all-reduce", FAIL, found, "the sum is wrong: look for a broken GPU or link")
    if device.type == "cuda" and size > 1 and speed < min_bandwidth:
        remedy = (
            "NCCL_DEBUG=INFO names the transport: look for TCP in place of InfiniBand, NVLink that is off, a slow link"
        )
        return Row("all-reduce", FAIL, f"{found}, less than {min_bandwidth:g}", remedy)
    return Row("all-reduce", OK, found)


def _seconds(x: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """How long an all-reduce takes."""
    start = time.perf_counter()
    dist.all_reduce(x, group=group)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def all_reduce_here() -> Row:
    """The same over the GPUs of this machine, or two processes without one, started for it."""
    size = torch.cuda.device_count() if torch.cuda.is_available() else 2
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row"
        try:
            torch.multiprocessing.spawn(_reduce, args=(size, folder, str(out)), nprocs=size)
        except Exception as error:  # the library's errors have no common type
            reason = str(error).strip().splitlines()[-1]
            return Row(
                "all-reduce", FAIL, reason, "NCCL_DEBUG=INFO prints more on GPUs; see host name and network above"
            )
        status, found, remedy = out.read_text().split("\n")
        return Row("all-reduce", status, found, remedy)


def _reduce(rank: int, size: int, folder: str, out: str) -> None:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    row = all_reduce(device, dist.group.WORLD)
    if rank == 0:
        Path(out).write_text(f"{row.status}\n{row.found}\n{row.remedy}")
    dist.destroy_process_group()


def clock_skew() -> Row:
    """How far apart the processes' clocks are, right after they have met."""
    dist.barrier()
    now: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(now, time.time())
    skew = max(now) - min(now)
    good = skew <= MAX_SKEW
    return Row(
        "clock skew", OK if good else WARN, f"{skew * 1000:.0f} ms at most", "" if good else "run NTP on every node"
    )


def merge(by_host: list[tuple[str, list[Row]]]) -> list[Row]:
    """One table of several machines: what is the same everywhere is one row, what differs names the machine."""
    out: list[Row] = []
    for name in dict.fromkeys(row.name for _, rows in by_host for row in rows):
        groups: dict[tuple[Row, ...], list[str]] = {}
        for host, rows in by_host:
            groups.setdefault(tuple(row for row in rows if row.name == name), []).append(host)
        for alike, hosts in groups.items():
            where = "" if len(groups) == 1 else f"{', '.join(hosts)}: "
            out += [Row(row.name, row.status, where + row.found, row.remedy) for row in alike]
            if not alike:
                out.append(Row(name, WARN, f"{', '.join(hosts)}: not checked", "nodes differ: look there"))
    return out
