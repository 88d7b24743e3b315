"""What one cluster differs in from another, as YAML: ``configs/cluster/``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ..errors import nearest
from ..machine import GPUS
from ..settings import read_as

KINDS = ("slurm", "kubernetes")

BOUNDS: dict[str, tuple[int, int]] = {
    "nodes": (1, 2**17),
    "gpus_per_node": (1, 2**10),
    "cores_per_node": (1, 2**16),
    "retries": (0, 10**6),
    "min_bandwidth": (0, 10**6),
    "hang_seconds": (1, 10**7),
}
SLURM_TIME = r"(\d+-\d+(:\d+){0,2})|(\d+(:\d+){1,2})"
"""Days-hours, days-hours:minutes..., minutes:seconds or hours:minutes:seconds. Slurm takes minutes alone, too: so it reads 86400,
which YAML makes of 24:00:00 without quotes, as two months."""
QUANTITY = r"\d+(\.\d+)?([kMGTP]|[KMGTP]i)"
"""Bytes, as Kubernetes writes them."""


@dataclass
class Profile:
    """A cluster, and how much of it a run takes. ``configs/cluster/example_slurm.yaml`` explains the fields."""

    kind: str = MISSING
    nodes: int = MISSING
    gpus_per_node: int = MISSING
    cores_per_node: int = MISSING
    gpu: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    retries: int = 10
    # Slurm
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    options: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=lambda: ["source .venv/bin/activate"])
    srun_options: list[str] = field(default_factory=list)
    check: bool = True
    min_bandwidth: float = 0.0
    hang_seconds: int = 1800
    # Kubernetes
    memory_per_node: str = "512Gi"
    namespace: str = "default"
    image: str = ""
    queue: str | None = None
    rdma: str | None = None

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    :raises ValueError: with one line that names the key and what would be right.
    """
    profile = read_as(Profile, path)
    if profile.kind not in KINDS:
        raise ValueError(
            f"{path}: kind={profile.kind!r} must be one of {', '.join(KINDS)}{nearest(profile.kind, KINDS)}"
        )
    for key, (low, high) in BOUNDS.items():
        if not low <= (value := getattr(profile, key)) <= high:
            raise ValueError(f"{path}: {key}={value} must lie between {low} and {high}")
    if not re.fullmatch(SLURM_TIME, profile.time):
        raise ValueError(f'{path}: time={profile.time} must be a time in quotes, as "24:00:00" or "2-12" (days-hours)')
    if not re.fullmatch(QUANTITY, profile.memory_per_node):
        raise ValueError(f"{path}: memory_per_node={profile.memory_per_node} must be a number with a unit, as 512Gi")
    if profile.gpu is not None and profile.gpu not in GPUS:
        raise ValueError(f"{path}: gpu={profile.gpu!r} must be one of {', '.join(GPUS)}{nearest(profile.gpu, GPUS)}")
    if profile.kind == "kubernetes" and not profile.image:
        raise ValueError(f"{path}: image is missing: a registry's name of the image that Dockerfile builds")
    return profile
