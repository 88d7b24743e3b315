"""Training with the stack ``ddp``: OLMoDDP's train module, made of the section that v1 is configured by.

``train_module`` keeps v1's keys. What the new stack has no counterpart for is refused by name before anything is built: it
would be ignored, or found out after minutes on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from olmo_core.config import DType
from olmo_core.distributed.parallel import DataParallelType, PipelineScheduleType
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.nn.transformer.config import OLMoDDPModelConfig
from olmo_core.optim import AdamWConfig
from olmo_core.optim.moe_optimizer import OLMoDDPOptimizer, OLMoDDPOptimizerConfig
from olmo_core.train import Trainer
from olmo_core.train.callbacks import (
    CheckpointerCallback,
    DownstreamEvaluatorCallbackConfig,
    LMEvaluatorCallbackConfig,
)
from olmo_core.train.train_module import OLMoDDPTrainModuleConfig, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer.config import TransformerPipelineParallelConfig

from ..model.stack import ddp_model, require_defaults
from .config import ExperimentConfig

SCHEDULES = (PipelineScheduleType.custom_interleaved_1F1B, PipelineScheduleType.custom_1F1B_V)
"""Pipelines that OLMo-core runs. It refuses the others once all ranks are up."""

STAGES_PER_RANK = 2
"""Parts of the model on each rank of both schedules."""


# ---- the optimiser ---------------------------------------------------------------------------------------------------


class StoppableOptimizer(OLMoDDPOptimizer):
    """OLMoDDP's AdamW, which takes every step unless a hook drops its gradients.

    Upstream leaves out steps whose loss or norm lies 6 standard deviations above the mean of the last 128, which the
    published recipe does not, and ends the process at a NaN: multiplied by a factor of zero it would still be one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._before_steps: list[Callable[..., Any]] = []
        super().__init__(*args, **kwargs)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> None:
        """Call ``hook(optimizer, args, kwargs)`` once the gradients and :attr:`latest_grad_norm` are known, before weights
        change."""
        self._before_steps.append(hook)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the step that is being taken: it leaves weights and moments as they are."""
        self.main_grad.clear()

    def get_step_factor(self) -> torch.Tensor:
        """1: every step counts."""
        return torch.ones((), device=self.device)

    def _step_foreach(self, closure: Any = None) -> None:
        for hook in self._before_steps:
            hook(self, (), {})
        if self.main_grad:
            super()._step_foreach(closure)
        self._step_skipped = torch.tensor(0.0 if self.main_grad else 1.0, device=self.device)


@dataclass
class StoppableOptimizerConfig(OLMoDDPOptimizerConfig):
    """Builds a :class:`StoppableOptimizer`."""

    @classmethod
    def optimizer(cls) -> type[StoppableOptimizer]:
        return StoppableOptimizer


# ---- the train module ------------------------------------------------------------------------------------------------


def model(config: ExperimentConfig) -> OLMoDDPModelConfig:
    """The model of a run in the stack ``ddp``, with its attention patterns."""
    return ddp_model(config.model_with_attention(), config.ddp)


def train_module(config: ExperimentConfig) -> OLMoDDPTrainModuleConfig:
    """The train module of a run in the stack ``ddp``, which :func:`check` has let through."""
    module = config.train_module
    optim, pipeline = module.optim, module.pp_config
    assert isinstance(optim, AdamWConfig) and module.max_grad_norm is not None
    return OLMoDDPTrainModuleConfig(
        rank_microbatch_size=module.rank_microbatch_size,
        max_sequence_length=module.max_sequence_length,
        optim=StoppableOptimizerConfig(
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fixed_fields=optim.fixed_fields,
            check_nan_inf_grad=False,  # the skip_non_finite callback looks at the norm
        ),
        max_grad_norm=module.max_grad_norm,
        scheduler=module.scheduler,
        compile_model=module.compile_model,
        dp_config=module.dp_config,
        pp_config=replace(pipeline, use_custom_stage_implementation=True) if pipeline is not None else None,
        cp_config=module.cp_config,
        ep_config=module.ep_config,
        z_loss_multiplier=module.z_loss_multiplier,
        label_ignore_index=module.label_ignore_index,
    )


def save_synchronously(trainer: Trainer) -> None:
    """Leave asynchronous saves, which are OLMo-core's default: this train module refuses them at the first one."""
    for callback in trainer.callbacks.values():
        if isinstance(callback, CheckpointerCallback):
            callback.save_async = False


# ---- what cannot train -----------------------------------------------------------------------------------------------


def check(config: ExperimentConfig) -> None:
    """Raise a ValueError for what the stack ``ddp`` cannot do, as far as the config alone tells."""
    model(config)
    try:
        config.ddp.ep.copy(deep=True).validate()
    except Exception as error:  # a type of OLMo-core's, or an enum's
        raise ValueError(f"ddp.ep: {error}") from None
    _check_module(config.train_module, config.model)
    _check_callbacks(config)


def _check_module(module: TransformerTrainModuleConfig, model: TransformerConfig) -> None:
    dp = module.dp_config
    if dp is None or dp.name != DataParallelType.ddp:
        found = "not set" if dp is None else f"set to {dp.name}"
        raise ValueError(
            f"train_module.dp_config.name is {found}, but stack=ddp replicates weights and has neither FSDP nor HSDP: "
            "set train_module.dp_config.name=ddp, or use stack=v1"
        )
    if dp.param_dtype != DType.bfloat16:
        raise ValueError(
            f"train_module.dp_config.param_dtype={dp.param_dtype}: stack=ddp computes in bfloat16, with float32 masters in the "
            "optimiser: set it to bfloat16, or use stack=v1"
        )
    if module.tp_config is not None:
        raise ValueError(
            "train_module.tp_config: stack=ddp has no tensor parallelism: use cp_config, ep_config or pp_config, or stack=v1"
        )
    if module.ac_config is not None:
        raise ValueError("train_module.ac_config: stack=ddp recomputes by ddp.recompute_each_block=true: use that")
    if type(module.optim) is not AdamWConfig:
        raise ValueError(f"train_module.optim is a {type(module.optim).__name__}: stack=ddp has AdamW only: type=adamw")
    if module.max_grad_norm is None:
        raise ValueError(
            "train_module.max_grad_norm is not set: stack=ddp would clip at 1.0: set it (1.0e9 never clips)"
        )
    require_defaults(
        module.optim,
        "train_module.optim",
        *("lr", "betas", "eps", "weight_decay", "fixed_fields"),
        known=("foreach", "fused"),  # how v1 computes the same step
    )
    require_defaults(
        module,
        "train_module",
        *("rank_microbatch_size", "max_sequence_length", "optim", "max_grad_norm", "scheduler", "compile_model"),
        *("dp_config", "tp_config", "pp_config", "cp_config", "ep_config", "z_loss_multiplier", "label_ignore_index"),
    )
    if module.pp_config is not None:
        _check_pipeline(module.pp_config, model.n_layers)


def _check_pipeline(pipeline: TransformerPipelineParallelConfig, n_layers: int) -> None:
    if pipeline.schedule not in SCHEDULES:
        raise ValueError(
            f"train_module.pp_config.schedule={pipeline.schedule}: OLMo-core 3.0.0 runs {' and '.join(SCHEDULES)} only: "
            "set one of them"
        )
    stages = STAGES_PER_RANK * pipeline.degree
    if pipeline.split_points is not None:
        if len(pipeline.split_points) != stages - 1:
            raise ValueError(
                f"train_module.pp_config.split_points has {len(pipeline.split_points)} points: {stages - 1} make the "
                f"{stages} stages of {pipeline.degree} ranks"
            )
    elif n_layers < stages:
        raise ValueError(
            f"train_module.pp_config.degree={pipeline.degree} makes {stages} stages, two a rank, but model.n_layers={n_layers}: "
            f"use at most {n_layers // STAGES_PER_RANK} ranks"
        )


def _check_callbacks(config: ExperimentConfig) -> None:
    module = config.train_module
    for name, callback in config.trainer.callbacks.items():
        key = f"trainer.callbacks.{name}"
        if isinstance(callback, CheckpointerCallback) and callback.save_async:
            raise ValueError(f"{key}.save_async=true: stack=ddp saves synchronously only: set it to false")
        if isinstance(callback, (LMEvaluatorCallbackConfig, DownstreamEvaluatorCallbackConfig)) and callback.enabled:
            for layout in ("pp_config", "cp_config"):
                if getattr(module, layout) is not None:
                    raise ValueError(
                        f"{key} needs the logits of whole sequences on every rank, which train_module.{layout} leaves on none "
                        f"or some of them: set {key}.enabled=false and use scripts/evaluate.py"
                    )


def check_ranks(config: ExperimentConfig, data_ranks: int) -> None:
    """Raise unless a layout fits a number of data-parallel ranks: those that take different sequences."""
    module = config.train_module
    cp, ep, pp = module.cp_config, module.ep_config, module.pp_config
    pool = data_ranks * (cp.degree if cp is not None else 1)
    if ep is not None and (ep.degree < 2 or pool % ep.degree):
        raise ValueError(
            f"train_module.ep_config.degree={ep.degree} does not divide the {pool} ranks of data and context parallelism: "
            "set it to a divisor of them above 1, or leave it unset"
        )
    for key, part in (("cp_config", cp), ("pp_config", pp)):
        if part is not None and part.degree < 2:
            raise ValueError(
                f"train_module.{key}.degree={part.degree}: leave train_module.{key} unset, or set 2 or more"
            )
    if pp is not None:
        parts = config.data_loader.global_batch_size // data_ranks // module.rank_microbatch_size
        if parts % max(1, parts // pp.degree):
            raise ValueError(
                f"train_module.pp_config.degree={pp.degree} cannot share out the {parts} microbatches of a rank's batch: change "
                "data_loader.global_batch_size or train_module.rank_microbatch_size so that they are a multiple of it"
            )


def check_machine(config: ExperimentConfig) -> None:
    """Raise where this machine cannot exchange tokens in the way that is asked for."""
    if config.train_module.ep_config is None or torch.cuda.is_available() or not config.ddp.ep.no_sync:
        return
    raise ValueError(f"ddp.ep.path={config.ddp.ep.path} needs CUDA: set ddp.ep.path=sync_1d on this machine")
