"""Trains the tiny model once per entry of a list of runs, all in one process group; what they measured out.

torchrun parallel_worker.py RUNS.json OUT.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import olmo_core.distributed.parallel as parallel
import torch
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.nn.ddp import OLMoDDPModel
from olmo_core.train import Trainer, prepare_training_environment, teardown_training_environment
from olmo_core.train.train_module import OLMoDDPTrainModuleConfig
from olmo_core.train.train_module.transformer.pipeline.pipeline_stage import CustomPipelineStage as Stage

from spattn_olmoe.metrics import read_metrics
from spattn_olmoe.model import PatternAttention, apply_remedies
from spattn_olmoe.train import ExperimentConfig, ddp, load_experiment
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import build_trainer, check, check_resume, checkpoint_to_load, load
from spattn_olmoe.train.shards import check_data

METRICS = ("train/CE loss", "optim/total grad norm", "train/load balancing loss")


def forget_head_offsets(trainer: Trainer) -> None:
    """Make every rank take its heads for the first ones of the model."""
    for module in trainer.train_module.model.modules():  # type: ignore[attr-defined]
        if isinstance(module, PatternAttention):
            backend = module.backend
            backend.head_offset = 0
            if backend.cp_enabled:  # the offset that the exchange of heads adds, taken away again
                group = backend.cp_pg
                assert group is not None
                backend.head_offset = -group.rank() * (module.n_heads // group.size())


@contextlib.contextmanager
def ddp_in_float32() -> Iterator[None]:
    """The stack ``ddp`` in float32, for differences that rounding would hide: upstream's class has it, its config has not.

    Its optimiser cannot be sharded then, and stages of a pipeline have to be told what they hand each other.
    """
    stock_dtype, stock_train_module, stock_stage = OLMoDDPModel._training_dtype, ddp.train_module, Stage.__init__

    def train_module(config: ExperimentConfig) -> OLMoDDPTrainModuleConfig:
        module = stock_train_module(config)
        module.optim.use_distributed = False
        return module

    def stage(self: Stage, *args: Any, **kwargs: Any) -> None:
        stock_stage(self, *args, **kwargs)
        self.p2p_dtype = torch.float32

    OLMoDDPModel._training_dtype, ddp.train_module, Stage.__init__ = torch.float32, train_module, stage  # type: ignore[method-assign]
    try:
        yield
    finally:
        OLMoDDPModel._training_dtype, ddp.train_module = stock_dtype, stock_train_module
        Stage.__init__ = stock_stage  # type: ignore[method-assign]


def train(base: str, overrides: list[str], forget: bool) -> list[list[float]]:
    parallel._WORLD_MESH = None  # OLMo-core allows one mesh a process; here each run has its own
    config = load_experiment(base, overrides)
    check(config)
    check_layout(config, get_world_size())
    check_data(config)
    checkpoint = checkpoint_to_load(config)
    config = check_resume(config, checkpoint)
    trainer = build_trainer(config)
    if checkpoint is not None:
        load(trainer, checkpoint)
    if forget:
        forget_head_offsets(trainer)
    trainer.fit()
    metrics = read_metrics(config.trainer.save_folder)
    return [[values[key] for key in METRICS] for values in metrics.values() if METRICS[0] in values]


def main() -> None:
    runs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    apply_remedies()
    prepare_training_environment(seed=0, backend="gloo")
    curves = {}
    for run in runs:
        with ddp_in_float32() if run.get("ddp_in_float32", False) else contextlib.nullcontext():
            curves[run["name"]] = train(run["base"], run["overrides"], run.get("forget", False))
        if get_rank() == 0:
            out.write_text(json.dumps(curves))
    teardown_training_environment()


if __name__ == "__main__":
    main()
