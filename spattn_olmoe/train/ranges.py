"""What numbers a config may hold: one table, for training, the dry run, the plan and the checks of a machine alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Bounds of a number, both included unless ``above``: then the lower one is not."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.above else 'at least'} {self.low:g} and at most {self.high:g}"


RANGES = {
    "init_seed": Range(0, 2**32 - 1),
    "attention.band_length": Range(1, 2**24),
    "model.d_model": Range(1, 2**17),
    "model.n_layers": Range(1, 2**10),
    "model.vocab_size": Range(2, 2**24),
    "model.init_std": Range(0, 1e3, above=True),
    "model.*.n_heads": Range(1, 2**12),
    "model.*.n_kv_heads": Range(1, 2**12),
    "model.*.head_dim": Range(1, 2**14),
    "model.*.theta": Range(0, 1e15, above=True),
    "model.*.num_experts": Range(1, 2**14),
    "model.*.hidden_size": Range(1, 2**20),
    "model.*.top_k": Range(1, 2**14),
    "model.*.eps": Range(0, 1, above=True),
    "model.*.?b_loss_weight": Range(0, 1e6),
    "model.*.z_loss_weight": Range(0, 1e6),
    "*.sequence_length": Range(1, 2**24),
    "*.tokenizer.vocab_size": Range(2, 2**24),
    "*.tokenizer.eos_token_id": Range(0, 2**24),
    "*.tokenizer.pad_token_id": Range(0, 2**24),
    "data_loader.global_batch_size": Range(1, 2**40),
    "data_loader.num_workers": Range(0, 2**10),
    "data_loader.seed": Range(0, 2**32 - 1),
    "train_module.rank_microbatch_size": Range(1, 2**32),
    "train_module.max_sequence_length": Range(1, 2**24),
    "train_module.max_grad_norm": Range(0, 1e30, above=True),
    "train_module.z_loss_multiplier": Range(0, 1e6),
    "train_module.optim.lr": Range(0, 100, above=True),
    "train_module.optim.betas": Range(0, 1 - 1e-9),
    "train_module.optim.eps": Range(0, 1, above=True),
    "train_module.optim.weight_decay": Range(0, 1e3),
    "train_module.scheduler.warmup": Range(0, 2**60),
    "train_module.scheduler.warmup_steps": Range(0, 2**60),
    "train_module.scheduler.warmup_fraction": Range(0, 1),
    "train_module.scheduler.alpha_f": Range(0, 1),
    "train_module.*_config.degree": Range(1, 2**20),
    "train_module.dp_config.shard_degree": Range(1, 2**20),
    "train_module.dp_config.num_replicas": Range(1, 2**20),
    "trainer.max_duration.value": Range(1, 2**60),
    "trainer.hard_stop.value": Range(1, 2**60),
    "trainer.metrics_collect_interval": Range(1, 2**31),
    "trainer.cancel_check_interval": Range(1, 2**31),
    "trainer.callbacks.*interval": Range(1, 2**40),
}
"""Bounds by key; ``*`` stands for any part of a key. A list's items have the bounds of its key. Null is nobody's number."""

LARGEST = 2**62
"""No other whole number may be further from zero: PyTorch's and NumPy's have 64 bits."""


def check_ranges(data: dict[str, Any]) -> None:
    """Raise at the first number of a nested config that is NaN, infinite or out of :data:`RANGES`.

    :raises ValueError: naming key, value and bounds.
    """
    for key, value in _numbers(data, ""):
        if isinstance(value, int) and abs(value) > LARGEST:  # first, since one of 400 digits is no float
            raise ValueError(f"{key}={str(value)[:30]}: must lie between -2**62 and 2**62")
        if not math.isfinite(value):
            raise ValueError(f"{key}={value}: must be a finite number")
        bounds = next((bounds for pattern, bounds in RANGES.items() if fnmatchcase(key, pattern)), None)
        if bounds is not None and value not in bounds:
            raise ValueError(f"{key}={value}: must be {bounds}")
    betas = data.get("train_module", {}).get("optim", {}).get("betas") if _is_nested(data) else None
    if isinstance(betas, (list, tuple)) and len(betas) != 2:
        raise ValueError(f"train_module.optim.betas={list(betas)}: must be two numbers")


def _is_nested(data: dict[str, Any]) -> bool:
    return isinstance(data.get("train_module"), dict) and isinstance(data["train_module"].get("optim", {}), dict)


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value
