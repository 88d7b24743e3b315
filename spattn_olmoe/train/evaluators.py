"""OLMo-core's evaluators inside a run: what the YAML may ask of them, checked before the run starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from olmo_core.data import NumpyDatasetConfig
from olmo_core.train import Trainer, TrainerConfig
from olmo_core.train.callbacks import DownstreamEvaluatorCallbackConfig, EvaluatorCallback, LMEvaluatorCallbackConfig
from olmo_core.train.train_module import TransformerTrainModuleConfig

from ..errors import nearest
from ..patterns import Pattern


def held_out_datasets(trainer: TrainerConfig) -> Iterator[tuple[str, NumpyDatasetConfig]]:
    """The data of every held-out loss that a run measures, each with its key in the config."""
    for name, callback in trainer.callbacks.items():
        if isinstance(callback, LMEvaluatorCallbackConfig) and callback.enabled:
            yield f"trainer.callbacks.{name}.eval_dataset", callback.eval_dataset


def check_evaluators(trainer: TrainerConfig, module: TransformerTrainModuleConfig, patterns: list[Pattern]) -> None:
    """Raise a ValueError for in-loop tasks that would fail, or score padding, once training has begun."""
    for name, callback in trainer.callbacks.items():
        if not isinstance(callback, DownstreamEvaluatorCallbackConfig) or not callback.enabled:
            continue
        key = f"trainer.callbacks.{name}"
        off = f"set {key}.enabled=false"
        if importlib.util.find_spec("olmo_eval") is None:
            raise ValueError(
                f"{key} takes its tasks from the package ai2-olmo-eval, which is not installed: "
                f"pip install ai2-olmo-eval, or {off}"
            )
        from olmo_eval import list_tasks

        for task in callback.tasks:
            if task not in (known := list_tasks()):
                raise ValueError(f"{key}.tasks: {task} is no task of ai2-olmo-eval{nearest(task, known)}")
        for layout in ("tp_config", "cp_config"):
            if getattr(module, layout) is not None:
                raise ValueError(
                    f"{key} needs the logits of whole sequences, which no rank has under train_module.{layout}: {off}"
                )
        if any(pattern.follows_input for pattern in patterns):
            raise ValueError(
                f"{key} pads its questions, and with attention.follows_input=true padding moves the bands: {off} and use "
                "scripts/evaluate.py, which does not pad then"
            )


def label_all_files(trainer: TrainerConfig, files: dict[str, list[str]]) -> None:
    """Give every file of a held-out dataset its label: one entry of ``metadata`` holds for all of them.

    :param files: the files of each of :func:`held_out_datasets`, by its key.
    """
    for key, dataset in held_out_datasets(trainer):
        if dataset.metadata is not None and len(dataset.metadata) == 1:
            dataset.metadata = dataset.metadata * len(files[key])


def check_not_empty(trainer: Trainer) -> None:
    """Raise where an evaluator has no whole batch: its loss would be not a number, for the whole run."""
    for name, callback in trainer.callbacks.items():
        if not isinstance(callback, EvaluatorCallback):
            continue
        for evaluator in callback.evaluators:
            batches: Any = evaluator.total_batches
            if batches == 0:
                raise ValueError(
                    f"trainer.callbacks.{name}: its data hold fewer documents than one batch of all ranks has sequences, so "
                    "nothing would be evaluated: lower train_module.rank_microbatch_size, prepare more, or set enabled=false"
                )
