"""What a config that has changed since the checkpoint does to a resumed run: the optimiser's options are the config's, seeds are
those that the run began with. OLMo-core takes both from the checkpoint, and would save a config that tells otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cached_path import cached_path
from olmo_core.distributed.utils import get_rank
from olmo_core.train import Trainer
from olmo_core.train.callbacks import ConfigSaverCallback

from ..json_files import read_json
from .checkpoints import is_own

log = logging.getLogger(__name__)

_PARAMETERS = ("params", "named_params")
"""Of an optimiser's group; all else are options."""


@contextmanager
def options_of_the_config(trainer: Trainer) -> Iterator[None]:
    """Load a checkpoint inside: the optimiser keeps the options that it was built with, and those that differ are named."""
    optim = getattr(trainer.train_module, "optim")  # noqa: B009  of all train modules but the base class
    scheduled = getattr(trainer.train_module, "scheduler", None) is not None
    configured = [
        {key: value for key, value in group.items() if key not in _PARAMETERS} for group in optim.param_groups
    ]
    yield
    changed: dict[str, None] = {}
    for group, options in zip(optim.param_groups, configured, strict=True):
        for key, value in options.items():
            before = group.get(key, value)
            if before is not value and before != value and not (key == "lr" and scheduled):  # which each step sets
                changed[f"train_module.optim.{key} was {before} and is {value} from here on"] = None
        group.update(options)
    if changed:
        log.info("%s", "; ".join(changed))


def keep_seeds(trainer: Trainer, checkpoint: str) -> None:
    """Save with a resumed run's config the seeds that it goes on with, and name those that differ."""
    if get_rank() != 0:
        return
    used = {"data_loader.seed": getattr(trainer.data_loader, "seed", None)}
    if is_own(trainer.save_folder, checkpoint):
        used |= _seeds_of_weights(checkpoint)
    saver = next(c for c in trainer.callbacks.values() if isinstance(c, ConfigSaverCallback))
    passed_over = []
    for key, value in used.items():
        *sections, name = key.split(".")
        section: Any = saver.config
        for part in sections:
            section = section[part]
        if value is not None and section[name] != value:
            passed_over.append(f"{key}={section[name]} is passed over, the run began with {value}")
            section[name] = value
    if passed_over:
        log.warning("%s: another seed needs another trainer.save_folder", "; ".join(passed_over))


def _seeds_of_weights(checkpoint: str) -> dict[str, int | None]:
    """Seeds that a run began with and has no more use for."""
    try:
        began = read_json(cached_path(f"{checkpoint.rstrip('/')}/config.json"), {"init_seed": int, "model": dict})
    except FileNotFoundError:
        return {}
    return {"init_seed": began["init_seed"], "model.init_seed": began["model"].get("init_seed")}
