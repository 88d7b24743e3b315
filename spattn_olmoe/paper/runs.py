"""What a table takes: which attention types, on which model, with which seeds.

Tables are those of arXiv 2511.09596. At the paper's scale each has its own models; at a small scale all tables share one
model, so that a run that two tables need is trained once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_core.train.common import DurationUnit

from ..commands import ROOT
from ..data.config import DataConfig
from ..data.config import load_config as load_data_config
from ..machine import gpu_hours
from ..model.flops import flops_per_token
from ..patterns import find_variant
from ..settings import read
from ..train.config import ExperimentConfig, load_experiment
from ..train.run import check

CONFIGS = ROOT / "configs"

REFERENCE = "sharing"
"""The variant that the others are compared with."""


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    :param models: its models at the paper's scale.
    :param rows: named mask and the row of the paper's table that it stands for, by model where the table has several.
    :param extra: named masks that the paper's table does not have.
    """

    models: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    extra: tuple[str, ...] = ()

    @property
    def variants(self) -> tuple[str, ...]:
        """The named masks of its rows, each once, and those beside them."""
        return tuple(dict.fromkeys([*(variant for variant, _ in self.rows), *self.extra]))


TABLES = {
    "table1": Table(
        ("0p25b1p75b", "1b7b"),
        (
            ("dense", "0.25B-1.75B Standard Attention"),
            ("sharing", "0.25B-1.75B SPAttention"),
            ("dense", "1B-7B Standard Attention"),
            ("sharing", "1B-7B SPAttention"),
        ),
    ),
    "table2": Table(
        ("table2",),
        (
            ("longformer", "Longformer"),
            ("reformer", "Reformer"),
            ("bigbird", "BigBird"),
            ("dense", "Standard"),
            ("sharing", "SPAttention"),
        ),
        extra=("reformer_lsh", "bigbird_seeded"),
    ),
    "table3": Table(
        ("0p25b1p75b",),
        (
            ("gbhalf", "GBHALF"),
            ("eball", "EBALL"),
            ("sliding_window", "Sliding Window"),
            ("sharing", "SPAttention"),
        ),
        extra=("dense", "exclusive"),
    ),
}


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    :param seeds: runs of each variant, unless asked otherwise.
    :param config: the config of its one model; None for the paper's own models.
    :param data: the data config; the runs' text.
    :param suite: the lm-eval suite of each table ("table": the table's own); None where scores would be chance.
    :param suite_limit: the first so many questions of each task.
    :param needs_gpu: whether it can be launched without one.
    :param scope: what this scale can and cannot show.
    """

    name: str
    seeds: int
    config: Path | None
    data: Path
    suite: str | None
    suite_limit: int | None
    needs_gpu: bool
    scope: str


SCALES = {
    "paper": Scale(
        "paper",
        seeds=1,
        config=None,
        data=CONFIGS / "data" / "dclm.yaml",
        suite="table",
        suite_limit=None,
        needs_gpu=True,
        scope="The paper's models and tasks. The paper prints neither its number of steps nor its seeds; the configs say which "
        "values are assumptions.",
    ),
    "gpu": Scale(
        "gpu",
        seeds=3,
        config=CONFIGS / "reproduce" / "gpu.yaml",
        data=CONFIGS / "data" / "reproduce_gpu.yaml",
        suite="core",
        suite_limit=500,
        needs_gpu=True,
        scope="Can show: whether types differ in held-out loss on web text after 52 M tokens, at which distances, and how much "
        "seeds matter. Cannot show: the paper's task scores, which such a model answers at chance but for the easiest tasks, "
        "and what thousands of times more training does.",
    ),
    "cpu": Scale(
        "cpu",
        seeds=3,
        config=CONFIGS / "reproduce" / "cpu.yaml",
        data=CONFIGS / "data" / "reproduce_cpu.yaml",
        suite=None,
        suite_limit=None,
        needs_gpu=False,
        scope="Can show: whether types differ in held-out loss in the first 0.6 M tokens of training a model of 2 M parameters "
        "on Python's documentation, at which distances, and how much seeds matter. Cannot show: the paper's task scores (such "
        "a model answers all of them at chance, so none is computed), what web text and long training do, nor speed on a GPU. "
        "An order of types here is an order here.",
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    :param seed: counted from 0; added to the config's seeds of weights and of data order, so 0 is the config itself.
    :param overrides: everything that the command line adds to ``config``, save folder included.
    :param key: names what training depends on, see :func:`config_key`: equal keys are the same run.
    """

    model: str
    variant: str
    seed: int
    config: Path
    overrides: tuple[str, ...]
    folder: Path
    key: str

    @property
    def name(self) -> str:
        """What folders and result files are called."""
        return f"{self.model}-{self.variant}-seed{self.seed}".replace("/", "-")

    def experiment(self) -> ExperimentConfig:
        """The run's config, checked."""
        config = load_experiment(self.config, self.overrides)
        check(config)
        return config


def runs_of(
    table: Table,
    scale: Scale,
    *,
    seeds: int,
    out: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    variants: Sequence[str] | None = None,
) -> list[Run]:
    """All runs of a table, seed by seed, so that a comparison stands as early as possible.

    :param config: another model than the scale's.
    :param overrides: ``key=value`` for all runs.
    :param variants: other variants than the table's.
    :raises ValueError: a config that does not exist or a key that is wrong.
    """
    runs = []
    own = config or scale.config
    for model in [own.stem] if own else table.models:
        for seed in range(seeds):
            for variant in variants or table.variants:
                path = own or _paper_config(model, variant)
                runs.append(make_run(model, variant, seed, path, overrides, out))
    return runs


def _paper_config(model: str, variant: str) -> Path:
    """The config of a model with this mask; of a mask that has none the dense one, which the overrides change."""
    type_ = find_variant(variant).type
    own = CONFIGS / f"{model}_{'spattn' if type_ == 'spattention' else type_}.yaml"
    return own if own.exists() else CONFIGS / f"{model}_standard.yaml"


def make_run(model: str, variant: str, seed: int, config: Path, overrides: Sequence[str], out: Path) -> Run:
    """One run of a config under a named mask, in a folder below ``out`` that is named after all that it depends on."""
    weights, order = _first_seeds(config, tuple(overrides))
    wanted = [
        *find_variant(variant).overrides,
        *overrides,
        f"init_seed={weights + seed}",
        f"data_loader.seed={order + seed}",
        "trainer.callbacks.start_record._CLASS_=spattn_olmoe.paper.same_start.StartRecord",
    ]
    key = config_key(read(config, wanted))
    folder = out / "runs" / f"{model}-{variant}-seed{seed}-{key}"
    return Run(model, variant, seed, config, (*wanted, f"trainer.save_folder={folder}"), folder, key)


@functools.cache
def _first_seeds(config: Path, overrides: tuple[str, ...]) -> tuple[int, int]:
    """The seeds of weights and of data order that a config states."""
    plain = read(config, overrides)
    return plain["init_seed"], plain["data_loader"]["seed"]


_WITHOUT_EFFECT = frozenset(
    {
        "olmo_core.train.callbacks.DownstreamEvaluatorCallbackConfig",
        "olmo_core.train.callbacks.LMEvaluatorCallbackConfig",
        "spattn_olmoe.paper.same_start.StartRecord",
        "spattn_olmoe.train.checkpoints.SafeCheckpointer",
        "spattn_olmoe.train.faults.SkipNonFinite",
        "spattn_olmoe.train.progress.Progress",
        "spattn_olmoe.train.wandb.WandB",
        "spattn_olmoe.train.watch.Heartbeat",
        "spattn_olmoe.train.watch.Stragglers",
    }
)
"""Callbacks that save and watch: a run with finite gradients ends with the same weights whatever they are set to."""


def config_key(resolved: dict[str, Any]) -> str:
    """Twelve hex digits that name what training depends on: a resolved config without its folders and what only watches."""
    plain = json.loads(json.dumps(resolved))
    outside = ("trainer", "save_folder"), ("dataset", "work_dir"), ("data_loader", "work_dir")
    for section, key in outside:
        plain[section].pop(key, None)
    callbacks = plain["trainer"].pop("callbacks", {})
    if counted := {name: callback for name, callback in callbacks.items() if _counts(callback)}:
        plain["trainer"]["callbacks"] = counted
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _counts(callback: dict[str, Any] | None) -> bool:
    """Whether a callback changes what comes out: the weights, or a curve that begins before the first step and is a result."""
    if callback is None:
        return False
    return callback.get("_CLASS_") not in _WITHOUT_EFFECT or callback.get("eval_on_startup", False)


def steps_of(config: ExperimentConfig) -> int:
    """Optimiser steps of a run.

    :raises ValueError: its length is not stated in steps.
    """
    duration = config.trainer.max_duration
    if duration.unit != DurationUnit.steps:
        raise ValueError(
            f"trainer.max_duration.unit={duration.unit}: a reproduction needs the same number of steps: use steps"
        )
    return duration.value


@dataclass(frozen=True)
class Cost:
    """Tokens and floating-point operations of a run."""

    tokens: int
    flops: float

    @property
    def gpu_hours(self) -> float:
        """Hours of an H100 or H200, by the one assumption of :mod:`..machine`."""
        return gpu_hours(self.flops)


def cost(run: Run) -> Cost:
    """What a run costs, by :func:`spattn_olmoe.model.flops.flops_per_token`."""
    config = run.experiment()
    tokens = steps_of(config) * config.data_loader.global_batch_size
    model = config.model_with_attention().build(init_device="meta")
    return Cost(tokens, float(tokens) * flops_per_token(model, config.sequence_length).total)


def data_config(scale: Scale) -> DataConfig:
    """The data that a scale's runs read."""
    return load_data_config(scale.data)
