"""The metrics of a run, as its file has them: read without OLMo-core, which takes seconds to import."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .json_files import parse_json

METRICS_FILE = "metrics.jsonl"
"""In a run's folder, one JSON object a line: metrics of a step."""


def keep_steps(path: Path, up_to: int) -> None:
    """Drop the lines of a metrics file that are broken or of later steps than ``up_to``, all or nothing."""
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text(errors="replace").splitlines()
        if (step := _step_of(line)) is not None and step <= up_to
    ]
    new = path.with_suffix(".tmp")
    new.write_text("".join(f"{line}\n" for line in kept))
    new.replace(path)


def _step_of(line: str) -> int | None:
    """The step of a line of a metrics file; None for one that was cut off as it was written."""
    metrics = _parsed(line)
    return None if metrics is None else metrics["step"]


def _parsed(line: str) -> dict[str, Any] | None:
    """The numbers of a line, NaN for null; None for a line that is no metrics of a step."""
    try:
        metrics = parse_json(line, METRICS_FILE, {"step": int})
    except ValueError:
        return None
    return {
        key: math.nan if value is None else value
        for key, value in metrics.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }


def last_step(folder: str | Path) -> int:
    """The last step that a run has written metrics of; 0 where there is none yet."""
    try:
        return max(read_metrics(folder), default=0)
    except FileNotFoundError:
        return 0


def curve(folder: str | Path) -> dict[int, tuple[float, float]]:
    """Loss and norm of the gradient by step, as far as a run has written them: equal for runs that computed the same."""
    return {
        step: (m["train/CE loss"], m["optim/total grad norm"])
        for step, m in read_metrics(folder).items()
        if "train/CE loss" in m
    }


def read_metrics(folder: str | Path) -> dict[int, dict[str, float]]:
    """The metrics of a run by step, in order of steps; NaN for those that were not finite, which the file has as null."""
    by_step: dict[int, dict[str, float]] = {}
    for line in (Path(folder) / METRICS_FILE).read_text(errors="replace").splitlines():
        if (metrics := _parsed(line)) is not None:
            by_step.setdefault(metrics.pop("step"), {}).update(metrics)
    return dict(sorted(by_step.items()))
