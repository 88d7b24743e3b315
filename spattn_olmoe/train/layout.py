"""A parallel layout: how ranks share a model and a batch, as OLMo-core 3.0.0 builds it from ``train_module``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatch

from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.attention.ring import UlyssesContextParallelStyle
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode as Checkpointing
from olmo_core.train.train_module.transformer.config import (
    TransformerActivationCheckpointingConfig,
    TransformerContextParallelConfig,
    TransformerDataParallelConfig,
    TransformerExpertParallelConfig,
    TransformerTensorParallelConfig,
)

from .config import ExperimentConfig

RECOMPUTABLE = ("attention_norm", "attention", "feed_forward_norm", "feed_forward_moe.experts")
"""Parts of a block that activation checkpointing may wrap. The router may not: it counts what it routes."""


@dataclass(frozen=True)
class Layout:
    """Ranks, and what each of them holds.

    :param ranks: number of processes, one a GPU.
    :param data_parallel: ``fsdp``, ``hsdp`` or ``ddp``; None for a single process without any.
    :param shard_degree: data-parallel ranks over which one copy of the weights is spread (all of them for ``fsdp``).
    :param tensor: degree of tensor parallelism; ``context`` of Ulysses, ``expert`` of expert parallelism.
    :param microbatch: tokens that a data-parallel rank takes at a time.
    :param recomputed: parts of every block, of :data:`RECOMPUTABLE`, that are computed again in the backward pass.
    """

    ranks: int
    data_parallel: str | None
    shard_degree: int
    tensor: int
    context: int
    expert: int
    microbatch: int
    recomputed: frozenset[str] = frozenset()

    @property
    def data_ranks(self) -> int:
        """Ranks that take different sequences."""
        return self.ranks // (self.tensor * self.context)

    @property
    def replicas(self) -> int:
        """Copies of the weights."""
        return self.data_ranks // self.shard_degree

    @property
    def shards(self) -> int:
        """Ranks over which FSDP spreads a weight that no other parallelism has cut: those of Ulysses join in."""
        return self.shard_degree * self.context if self.data_parallel in ("fsdp", "hsdp") else 1

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch of which a rank holds the activations."""
        return self.microbatch // (self.tensor * self.context)

    @property
    def parallelisms(self) -> int:
        """How many things are to be understood besides FSDP: the smaller, the simpler."""
        return sum(
            (self.tensor > 1, self.context > 1, self.expert > 1, self.data_parallel != "fsdp", bool(self.recomputed))
        )

    def __str__(self) -> str:
        parts = [self.data_parallel or "one process"]
        parts += [f"shard {self.shard_degree} x {self.replicas} replicas"] if self.data_parallel == "hsdp" else []
        for name, degree in (("TP", self.tensor), ("Ulysses", self.context), ("EP", self.expert)):
            parts += [f"{name} {degree}"] if degree > 1 else []
        return ", ".join(parts) + (", recompute" if self.recomputed else "")

    @classmethod
    def of(cls, config: ExperimentConfig, ranks: int) -> Layout:
        """The layout that a config asks for on a number of ranks; :func:`check_layout` says whether it can be.

        :raises ValueError: pipeline parallelism, ring attention or a way of checkpointing that is not modelled.
        """
        module = config.train_module
        if module.pp_config is not None:
            raise ValueError("train_module.pp_config: pipeline parallelism is not modelled; unset it to plan")
        if module.cp_config is not None and module.cp_config.ring is not None:
            raise ValueError("train_module.cp_config.ring is not supported: use train_module.cp_config.uly={}")
        tensor, context, expert = (
            part.degree if part is not None else 1 for part in (module.tp_config, module.cp_config, module.ep_config)
        )
        data_ranks = ranks // (tensor * context)
        dp = module.dp_config
        shard = {"fsdp": data_ranks, "ddp": 1}.get(str(dp.name), 0) if dp is not None else 1
        if dp is not None and dp.name == DataParallelType.hsdp:
            _, shard = dp.get_replicate_and_shard_degree(data_ranks)
        return cls(
            ranks=ranks,
            data_parallel=str(dp.name) if dp is not None else None,
            shard_degree=shard,
            tensor=tensor,
            context=context,
            expert=expert,
            microbatch=module.rank_microbatch_size,
            recomputed=_recomputed(module.ac_config),
        )

    def apply(self, config: ExperimentConfig) -> ExperimentConfig:
        """A config that asks for this layout."""
        module = config.train_module
        dp = module.dp_config or TransformerDataParallelConfig(name=DataParallelType.fsdp)
        dp = dataclasses.replace(
            dp,
            name=DataParallelType(self.data_parallel or "fsdp"),
            shard_degree=self.shard_degree if self.data_parallel == "hsdp" else None,
            num_replicas=None,
        )
        module = dataclasses.replace(
            module,
            rank_microbatch_size=self.microbatch,
            dp_config=dp if self.data_parallel else None,
            tp_config=TransformerTensorParallelConfig(degree=self.tensor) if self.tensor > 1 else None,
            cp_config=TransformerContextParallelConfig(degree=self.context, uly=UlyssesContextParallelStyle())
            if self.context > 1
            else None,
            ep_config=TransformerExpertParallelConfig(degree=self.expert) if self.expert > 1 else None,
            ac_config=TransformerActivationCheckpointingConfig(
                mode=Checkpointing.selected_modules, modules=[f"blocks.*.{part}" for part in sorted(self.recomputed)]
            )
            if self.recomputed
            else None,
        )
        return dataclasses.replace(config, train_module=module)

    def overrides(self, config: ExperimentConfig) -> list[str]:
        """``key=value`` arguments that turn a config into one of this layout."""
        module = config.train_module
        out = [f"train_module.rank_microbatch_size={self.microbatch}"]
        if self.data_parallel is None:
            out += ["train_module.dp_config=null"]
        else:
            out += [f"train_module.dp_config.name={self.data_parallel}"]
            if self.data_parallel == "hsdp":
                out += [f"train_module.dp_config.shard_degree={self.shard_degree}"]
        for key, degree in (("tp_config", self.tensor), ("cp_config", self.context), ("ep_config", self.expert)):
            if degree > 1:
                out += [f"train_module.{key}.degree={degree}"]
            elif getattr(module, key) is not None:
                out += [f"train_module.{key}=null"]
        if self.context > 1:
            out += ["train_module.cp_config.uly={}"]
        if self.recomputed:
            modules = ",".join(f"blocks.*.{part}" for part in sorted(self.recomputed))
            out += ["train_module.ac_config.mode=selected_modules", f"train_module.ac_config.modules=[{modules}]"]
        elif module.ac_config is not None:
            out += ["train_module.ac_config=null"]
        return out


def _recomputed(ac: TransformerActivationCheckpointingConfig | None) -> frozenset[str]:
    """The parts of a block that a checkpointing config wraps."""
    if ac is None:
        return frozenset()
    if ac.mode in (Checkpointing.full, Checkpointing.selected_blocks):
        raise ValueError(
            f"train_module.ac_config.mode={ac.mode}: OLMo-core wraps no block of a mixture of experts; use selected_modules "
            f"with modules=[{','.join(f'blocks.*.{part}' for part in RECOMPUTABLE)}]"
        )
    if ac.mode != Checkpointing.selected_modules:
        raise ValueError(f"train_module.ac_config.mode={ac.mode} is not modelled: use selected_modules")
    parts = {part: [g for g in ac.modules or [] if fnmatch(f"blocks.0.{part}", g)] for part in RECOMPUTABLE}
    known = {glob for globs in parts.values() for glob in globs}
    for glob in ac.modules or []:
        if glob not in known:
            raise ValueError(
                f"train_module.ac_config.modules has {glob}, which is not modelled (modelled: "
                f"{', '.join(f'blocks.*.{part}' for part in RECOMPUTABLE)})"
            )
    return frozenset(part for part, globs in parts.items() if globs)
