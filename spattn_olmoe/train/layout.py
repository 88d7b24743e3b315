"""A parallel layout: how ranks share a model and a batch, as OLMo-core 3.0.0 builds it from ``train_module``.

All that knows degrees is here: :class:`Layout` reads and writes them, :func:`check_layout` refuses what cannot train.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatch

from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.attention.ring import UlyssesContextParallelStyle
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode as Checkpointing
from olmo_core.nn.transformer import TransformerBlockConfig
from olmo_core.train.train_module import TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer.config import (
    TransformerActivationCheckpointingConfig,
    TransformerContextParallelConfig,
    TransformerDataParallelConfig,
    TransformerExpertParallelConfig,
    TransformerTensorParallelConfig,
)

from ..model.mixer import PatternAttentionConfig
from ..model.stack import Stack
from . import ddp
from .config import ExperimentConfig
from .degrees import Degrees

RECOMPUTABLE = ("attention_norm", "attention", "feed_forward_norm", "feed_forward_moe.experts")
"""Parts of a block that activation checkpointing may wrap. The router may not: it counts what it routes."""

GPUS_PER_NODE = 8
"""GPUs that NVLink connects, as in NVIDIA's HGX and DGX machines: taken where nobody says how many a machine has."""

MOST_RANKS = 2**20
"""More GPUs than anybody has; above that, searching for a layout takes for ever."""


def nodes_of(ranks: int) -> int:
    """Machines of up to :data:`GPUS_PER_NODE` GPUs, all alike, that so many ranks take."""
    return ranks // next(n for n in range(GPUS_PER_NODE, 0, -1) if ranks % n == 0)


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
        """Number of kinds of parallelism besides plain FSDP; of two layouts that fit, the smaller is preferred."""
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
    def of(cls, config: ExperimentConfig, ranks: int, nodes: int | None = None) -> Layout:
        """The layout that a config asks for on a number of ranks; :func:`check_layout` tells whether it can be.

        :param nodes: the machines, of each of which OLMo-core makes a replica for ``hsdp`` without degrees; :func:`nodes_of`
            the ranks if left out.
        :raises ValueError: pipeline parallelism, ring attention or a way of checkpointing that is not modelled.
        """
        module = config.train_module
        if config.stack != Stack.v1:
            raise ValueError(f"stack={config.stack} is not modelled: set stack=v1 to plan")
        if module.pp_config is not None:
            raise ValueError("train_module.pp_config: pipeline parallelism is not modelled; unset it to plan")
        if module.cp_config is not None and module.cp_config.ring is not None:
            raise ValueError("train_module.cp_config.ring is not supported: use train_module.cp_config.uly={}")
        degrees = Degrees.of(module)
        data_ranks = ranks // degrees.heads
        dp = module.dp_config
        shard = {"fsdp": data_ranks, "ddp": 1}.get(str(dp.name), 0) if dp is not None else 1
        if dp is not None and dp.name == DataParallelType.hsdp:
            # OLMo-core's own arithmetic asks the process group for the nodes, and takes one where there is none
            shard = dp.shard_degree or max(1, data_ranks // (dp.num_replicas or nodes or nodes_of(ranks)))
        return cls(
            ranks=ranks,
            data_parallel=str(dp.name) if dp is not None else None,
            shard_degree=shard,
            **degrees._asdict(),
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


# ---- what cannot train ------------------------------------------------------------------------------------------------


def check_layout(config: ExperimentConfig, world_size: int, nodes: int | None = None) -> None:
    """Raise unless the parallel layout fits a number of ranks.

    OLMo-core finds out some of this after minutes, on all ranks at once, and some of it never: it then trains wrongly.

    :param nodes: as for :meth:`Layout.of`.
    """
    if not 1 <= world_size <= MOST_RANKS:
        raise ValueError(f"--gpus {world_size}: must lie between 1 and {MOST_RANKS}")
    module, T = config.train_module, config.sequence_length
    v1 = config.stack == Stack.v1
    if v1 and module.pp_config is not None:
        raise ValueError(
            "train_module.pp_config: OLMo-core 3.0.0's pipelines train no model with this train module (its stages reject the "
            "loss that it hands them): leave it unset and use fsdp or hsdp, with tp_config or cp_config, or set stack=ddp"
        )
    # Degrees multiply, so each must divide what those before it leave. Expert parallelism reuses data-parallel ranks.
    degree = 1
    for name in ("pp_config", "tp_config", "cp_config"):
        part = getattr(module, name)
        if part is None:
            continue
        if part.degree < 1 or world_size % (degree * part.degree):
            raise ValueError(
                f"train_module.{name}.degree={part.degree} does not divide the {world_size // degree} ranks there are for it: "
                f"start a multiple of {degree * part.degree} ranks or lower the degree"
            )
        degree *= part.degree
    parallel = any(x is not None for x in (module.tp_config, module.cp_config, module.ep_config))
    if world_size > 1 and module.dp_config is None:
        raise ValueError(
            f"train_module.dp_config is not set but {world_size} ranks were started: each would train a model of its own; "
            "set train_module.dp_config.name=fsdp"
        )
    dp = module.dp_config
    if dp is not None and dp.name == DataParallelType.ddp and module.tp_config is not None:
        raise ValueError(
            "train_module.dp_config.name=ddp with tp_config trains nothing in OLMo-core 3.0.0 (the gradient norm is 0): use fsdp"
        )
    for key in ("shard_degree", "num_replicas"):
        if dp is not None and dp.name != DataParallelType.hsdp and getattr(dp, key) is not None:
            raise ValueError(
                f"train_module.dp_config.{key}={getattr(dp, key)} does nothing with train_module.dp_config.name={dp.name}: set "
                f"name to hsdp, or train_module.dp_config.{key}=null"
            )
    if parallel and dp is None:
        raise ValueError("train_module.dp_config must be set with any other parallelism: set its name to fsdp")
    ranks = world_size // degree
    _check_shards(config)
    if v1:
        _check_data_parallel(module, ranks, nodes or nodes_of(world_size))
        _check_recomputation(config)
    if config.data_loader.global_batch_size % (ranks * T):
        raise ValueError(
            f"data_loader.global_batch_size={config.data_loader.global_batch_size} (tokens) must be a multiple of "
            f"{ranks} data-parallel ranks x {T} tokens = {ranks * T}"
        )
    per_rank = config.data_loader.global_batch_size // ranks
    if per_rank % module.rank_microbatch_size:
        raise ValueError(
            f"train_module.rank_microbatch_size={module.rank_microbatch_size} (tokens) must divide the {per_rank} tokens "
            f"that each of {ranks} data-parallel ranks takes of a batch; set it to {per_rank} or a divisor"
        )
    if not v1:
        ddp.check_ranks(config, ranks)


def _check_shards(config: ExperimentConfig) -> None:
    """Raise where tensor, context or expert parallelism would have to cut a head, a token or an expert."""
    module = config.train_module
    if module.cp_config is not None and module.cp_config.ring is not None:
        raise ValueError(
            "train_module.cp_config.ring knows only the causal mask: use Ulysses, train_module.cp_config.uly={} without ring"
        )
    model = config.model_with_attention()
    assert isinstance(model.block, TransformerBlockConfig)  # attach() refuses others
    blocks = [model.block, *(model.block_overrides or {}).values()]
    tp, cp, ep = Degrees.of(module)
    sequence, heads, experts = [("dataset.sequence_length", config.sequence_length)], [], []
    for block in blocks:
        mixer, moe = block.sequence_mixer, block.feed_forward_moe
        assert isinstance(mixer, PatternAttentionConfig)
        heads += [("n_heads", mixer.n_heads), ("n_kv_heads", mixer.n_kv_heads or mixer.n_heads)]
        experts += [("num_experts", moe.num_experts)] if moe is not None else []
    # Ulysses takes whole heads after tensor parallelism has taken its share, and both cut the sequence; experts are cut
    # by tensor parallelism, but dealt out whole by expert parallelism.
    both = f"tp_config.degree={tp} x cp_config.degree={cp}" if tp > 1 < cp else ""
    for degree, name, parts in (
        (tp * cp, both or (f"cp_config.degree={cp}" if cp > 1 else f"tp_config.degree={tp}"), heads + sequence),
        (tp, f"tp_config.degree={tp}", experts),
        (ep, f"ep_config.degree={ep}", experts),
    ):
        for key, size in parts:
            if degree < 1 or size % degree:
                raise ValueError(f"train_module.{name} does not divide {key}={size}: use a divisor of it")


def _check_data_parallel(module: TransformerTrainModuleConfig, ranks: int, nodes: int) -> None:
    """Raise unless ``ranks`` data-parallel ranks can be the replicas, shards and expert groups that are asked for."""
    dp, ep = module.dp_config, module.ep_config
    hsdp = dp is not None and dp.name == DataParallelType.hsdp
    if dp is not None and hsdp:
        for key in ("shard_degree", "num_replicas"):
            part = getattr(dp, key)
            if part is not None and (part < 1 or ranks % part):
                raise ValueError(
                    f"train_module.dp_config.{key}={part} does not divide the {ranks} data-parallel ranks: "
                    "set it to a divisor of them"
                )
        shard, replicas = dp.shard_degree, dp.num_replicas
        if shard is not None and replicas is not None and shard * replicas != ranks:
            raise ValueError(
                f"train_module.dp_config.shard_degree={shard} x num_replicas={replicas} is not the {ranks} data-parallel ranks: "
                "set train_module.dp_config.num_replicas=null, which makes them as many as there is room for"
            )
        if shard is None and replicas is None and ranks % nodes:
            raise ValueError(
                f"train_module.dp_config.name=hsdp makes a replica of each of {nodes} nodes, which do not divide the {ranks} "
                "data-parallel ranks: set train_module.dp_config.shard_degree to a divisor of them"
            )
    if ep is None:
        return
    for other in ("tp_config", "cp_config"):
        if getattr(module, other) is not None:
            raise ValueError(
                f"train_module.ep_config with {other} does not work in OLMo-core 3.0.0: leave one of them unset"
            )
    if dp is None or not hsdp or dp.shard_degree != ep.degree:
        found = f"name={dp.name} and shard_degree={dp.shard_degree}" if dp is not None else "none"
        raise ValueError(
            f"train_module.ep_config.degree={ep.degree} needs train_module.dp_config.name=hsdp and "
            f"train_module.dp_config.shard_degree={ep.degree}, not {found}"
        )


def _check_recomputation(config: ExperimentConfig) -> None:
    """Raise unless activation checkpointing leaves a mixture of experts and context parallelism intact."""
    module, Mode = config.train_module, Checkpointing
    ac = module.ac_config
    if ac is None:
        return
    instead = "use mode=selected_modules with modules=[blocks.*.feed_forward_moe.experts,blocks.*.attention]"
    if ac.mode == Mode.budget and not module.compile_model:
        raise ValueError(
            f"train_module.ac_config.mode=budget does nothing without train_module.compile_model=true: set it, or {instead}"
        )
    if ac.mode in (Mode.full, Mode.selected_blocks, Mode.selected_ops):
        raise ValueError(
            f"train_module.ac_config.mode={ac.mode} runs the router again in the backward pass, which counts its losses "
            f"twice in OLMo-core 3.0.0: {instead}"
        )
    for layer in range(config.model.n_layers):
        for part in ("", ".feed_forward_moe", ".feed_forward_moe.router"):
            if any(fnmatch(f"blocks.{layer}{part}", pattern) for pattern in ac.modules or ()):
                raise ValueError(
                    f"train_module.ac_config.modules={ac.modules} matches blocks.{layer}{part} and with it the router, whose "
                    "losses would be counted twice: name the experts and the attention, "
                    "modules=[blocks.*.feed_forward_moe.experts,blocks.*.attention]"
                )
        if module.cp_config is not None and any(fnmatch(f"blocks.{layer}.attention", p) for p in ac.modules or ()):
            raise ValueError(
                f"train_module.ac_config.modules={ac.modules} matches blocks.{layer}.attention, which OLMo-core 3.0.0 cannot "
                "recompute under cp_config: leave it out"
            )
