"""Which models are trained on which task, and bringing all of them to their end, now or after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ...files import replace_file
from ...json_files import read_json
from ...machine import describe
from ...model.section import layer_patterns, with_attention
from ...patterns.variants import find_variant
from .tasks import Task, build_task
from .training import Setting, build_config, train

FORMAT = "spattn_olmoe recall run 1"

STUDIES: dict[str, tuple[str, dict[str, Any]]] = {
    "recall": ("one_hop", {}),
    "recall_two_hop": ("two_hop", {"length": 256, "vocab": 512, "pairs": 8}),
    "copying": ("copying", {}),
    "selective_copying": ("selective_copying", {}),
}
"""The targets of scripts/reproduce.py: a task and how it is set for a CPU."""

SCALES: dict[str, tuple[Setting, dict[str, Any]]] = {
    "cpu": (Setting(), {}),
    "gpu": (
        Setting(d_model=256, n_layers=4, hidden=512, batch=128, steps=10_000, lr=1e-3),
        {"length": 1024, "pairs": 16},
    ),
    "paper": (
        Setting(d_model=512, n_layers=4, hidden=1024, batch=64, steps=50_000, lr=5e-4),
        {"length": 8192, "pairs": 16},
    ),
}
"""Model, training and options of the task by scale. ``paper`` has the length at which CoWindow (arXiv 2609.32704) reports
associative recall; the paper reproduced here has no such experiment."""

VARIANTS = (
    "dense",
    "sharing",
    "exclusive",
    "eball",
    "gbhalf",
    "sliding_window",
    "equal_area_sharing",
    "sharing_sinks",
    "sharing/dense_last",
)
"""What is compared unless asked otherwise: named masks, and after a slash which layers stay dense."""


@dataclass(frozen=True)
class Job:
    """One model to train.

    :param name: a named mask, with ``/dense_last`` and the like for a hybrid.
    :param key: names all that its result depends on: equal masks at equal settings are one run, under whatever name.
    """

    name: str
    task_name: str
    task: Task
    setting: Setting
    attention: dict[str, Any]
    seed: int
    key: str

    def file(self, out: Path) -> Path:
        """Where the result of this job is written."""
        return out / "runs" / f"{self.task_name}-{self.key}-seed{self.seed}.json"


def section(name: str) -> dict[str, Any]:
    """The attention section of a name: ``sharing``, or ``sharing/dense_last`` for a hybrid.

    :raises ValueError: no such mask.
    """
    mask, _, layers = name.partition("/")
    variant = find_variant(mask)
    return {"type": variant.type, **variant.options, **({"layers": layers} if layers else {})}


def plan_jobs(
    study: str, variants: Sequence[str], seeds: int, setting: Setting, options: dict[str, Any] | None = None
) -> list[Job]:
    """All models of a study, seed by seed, so that a comparison stands as early as possible.

    :raises ValueError: an unknown mask, or a task that cannot be made.
    """
    task_name, preset = STUDIES[study]
    task = build_task(task_name, **{**preset, **(options or {})})
    jobs = []
    for seed in range(seeds):
        for name in variants:
            attention = section(name)
            jobs.append(Job(name, task_name, task, setting, attention, seed, _key(task_name, task, setting, attention)))
    return jobs


def _key(task_name: str, task: Task, setting: Setting, attention: dict[str, Any]) -> str:
    model = with_attention(build_config(setting, task), band_length=task.length, **attention)
    masks = [
        pattern.intervals.tolist() if pattern.intervals is not None else pattern.to_config()
        for pattern in layer_patterns(model)
    ]
    text = json.dumps([task_name, asdict(task), asdict(setting), masks], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_jobs(
    jobs: Sequence[Job], out: Path, *, workers: int, say: Callable[[str], None], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Train what is not there yet, several at a time; the results in the order of the jobs."""
    wanted = {job.file(out): job for job in jobs if not job.file(out).exists()}
    say(f"{len(wanted)} models to train, {len({job.file(out) for job in jobs}) - len(wanted)} are there already")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_run, job, out, device): job for job in wanted.values()}
        try:
            for done in as_completed(running):
                result, job = done.result(), running[done]
                last = result["curve"][-1]
                end = f"accuracy {last['accuracy']:.2f} after {last['step']} steps"
                say(f"{job.name}, seed {job.seed}: {end}, {result['seconds']:.0f} s")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [{**read_json(job.file(out), dict), "name": job.name} for job in jobs]


def _run(job: Job, out: Path, device: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    state = job.file(out).with_suffix(".pt")
    started = time.monotonic()
    curve = train(job.setting, job.task, job.attention, job.seed, state=state, device=device)
    result = {
        "format": FORMAT,
        "key": job.key,
        "task": {"name": job.task_name, "chance": job.task.chance, **asdict(job.task)},
        "setting": asdict(job.setting),
        "attention": job.attention,
        "seed": job.seed,
        "seconds": time.monotonic() - started,
        "machine": describe(device),
        "curve": curve,
    }
    replace_file(job.file(out), json.dumps(result).encode() + b"\n")
    state.unlink(missing_ok=True)
    return result
