"""Which layouts fit a cluster, and which of them to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.common import DurationUnit

from ..machine import GPU, GPUS, gpu_hours
from ..model.flops import Flops, flops_per_token
from ..model.stack import Stack
from ..train.config import ExperimentConfig
from ..train.layout import RECOMPUTABLE, Layout, check_layout
from .memory import USABLE, Memory, Shape, checkpoint_bytes, memory

DEGREES = (1, 2, 4, 8)
"""Degrees of tensor, context and expert parallelism that are tried: those that stay within a node."""


@dataclass(frozen=True)
class Candidate:
    """A layout with the memory that it takes of a GPU."""

    layout: Layout
    memory: Memory

    @property
    def preference(self) -> tuple[float, ...]:
        """The smallest is taken.

        Few parallelisms first: each is one more thing to understand when a run fails. Among equals, small degrees, since
        ranks that share a layer wait for each other in every layer; Ulysses before tensor parallelism, which exchanges
        twice as often and leaves each rank narrower products; then long microbatches, which FSDP gathers weights for once.
        """
        it = self.layout
        return (it.parallelisms, it.tensor * it.context * it.expert, it.tensor, it.expert, -it.microbatch, it.shards)


@dataclass(frozen=True)
class Plan:
    """What a config needs on a cluster.

    :param config: the config with the chosen layout in it; ``overrides`` make it of the original.
    :param fitting: every layout that trains and fits, in order of preference.
    :param refused: how many layouts were refused, by why.
    :param checkpoint: bytes of one checkpoint.
    :param tokens: tokens of the whole run; None for a run that is counted in epochs.
    """

    config: ExperimentConfig
    ranks: int
    gpu: GPU
    shape: Shape
    flops: Flops
    fitting: tuple[Candidate, ...]
    refused: Counter[str]
    checkpoint: float
    tokens: int | None
    overrides: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        """The layout to take."""
        return self.fitting[0]

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors may fill."""
        return self.gpu.memory * USABLE

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run, by :func:`spattn_olmoe.machine.gpu_hours`; None for a run that is counted in epochs."""
        return None if self.tokens is None else gpu_hours(float(self.tokens) * self.flops.total, self.gpu.name.lower())


def plan(config: ExperimentConfig, ranks: int, gpu_name: str) -> Plan:
    """Try every layout on ``ranks`` GPUs of a kind and choose one, by memory and :attr:`Candidate.preference` alone.

    :param gpu_name: a key of :data:`.GPUS`.
    :raises ValueError: there is no such GPU, or no layout fits; the message names what would help.
    """
    if gpu_name not in GPUS:
        raise ValueError(f"--gpu {gpu_name}: is not known (known: {', '.join(GPUS)})")
    if ranks < 1:
        raise ValueError(f"--gpus {ranks}: must be at least 1")
    if config.stack != Stack.v1:
        raise ValueError(f"stack={config.stack} is not modelled: set stack=v1 to plan")
    model = config.model_with_attention().build(init_device="meta")
    shape = Shape.of(config, model)
    room = GPUS[gpu_name].memory * USABLE
    refused: Counter[str] = Counter()
    tried = [Candidate(layout, memory(config, layout, shape)) for layout in _layouts(config, ranks, refused)]
    fitting = [candidate for candidate in tried if candidate.memory.peak <= room]
    if not fitting:
        smallest = min((candidate.memory.peak for candidate in tried), default=None)
        raise ValueError(_why_none(config, ranks, gpu_name, refused, smallest, room))
    if len(fitting) < len(tried):
        refused["does not fit in memory"] = len(tried) - len(fitting)
    fitting.sort(key=lambda candidate: candidate.preference)
    best = fitting[0].layout
    chosen = best.apply(config)
    check_layout(chosen, ranks)
    return Plan(
        config=chosen,
        ranks=ranks,
        gpu=GPUS[gpu_name],
        shape=shape,
        flops=flops_per_token(model, config.sequence_length),
        fitting=tuple(fitting),
        refused=refused,
        checkpoint=checkpoint_bytes(chosen, shape),
        tokens=total_tokens(config),
        overrides=tuple(best.overrides(config)),
    )


def total_tokens(config: ExperimentConfig) -> int | None:
    """Tokens of a run; None where it is counted in epochs."""
    duration = config.trainer.max_duration
    if duration.unit == DurationUnit.steps:
        return duration.value * config.data_loader.global_batch_size
    return duration.value if duration.unit == DurationUnit.tokens else None


def _layouts(config: ExperimentConfig, ranks: int, refused: Counter[str]) -> Iterator[Layout]:
    """Every layout that :func:`check_layout` lets through, with every microbatch, with and without recomputing."""
    T, batch = config.sequence_length, config.data_loader.global_batch_size
    for layout in _shapes(ranks, T):
        try:
            check_layout(layout.apply(config), ranks)
        except (ValueError, OLMoConfigurationError) as error:
            refused[_reason(str(error))] += 1
            continue
        per_rank = batch // layout.data_ranks
        # OLMo-core cannot recompute attention under context parallelism: check_layout refuses it.
        recomputable = frozenset(RECOMPUTABLE) - ({"attention"} if layout.context > 1 else set())
        # Doubling is enough: memory grows with the microbatch, and a divisor between two powers gains little.
        microbatch = T
        while microbatch <= per_rank:
            if per_rank % microbatch == 0:
                yield replace(layout, microbatch=microbatch)
                yield replace(layout, microbatch=microbatch, recomputed=recomputable)
            microbatch *= 2


def _shapes(ranks: int, T: int) -> Iterator[Layout]:
    """Layouts by their degrees alone, with the smallest microbatch. DDP is left out: it would train in bfloat16."""
    for tensor in DEGREES:
        for context in DEGREES:
            data_ranks = ranks // (tensor * context)
            if data_ranks * tensor * context != ranks:
                continue
            yield Layout(ranks, "fsdp", data_ranks, tensor, context, 1, T)
            # HSDP takes more memory than FSDP at the same ranks, but keeps gathering inside a node.
            shard = 2
            while shard < data_ranks:
                if data_ranks % shard == 0:
                    yield Layout(ranks, "hsdp", shard, tensor, context, 1, T)
                shard *= 2
    # Experts are dealt out inside a copy of the weights, so OLMo-core wants the degree of sharding to be theirs.
    for expert in DEGREES[1:]:
        if ranks % expert == 0:
            yield Layout(ranks, "hsdp", expert, 1, 1, expert, T)


def _reason(message: str) -> str:
    """The kind of a refusal."""
    for key in ("global_batch_size", "n_heads", "num_experts", "rank_microbatch_size", "sequence_length"):
        if key in message.split(":")[0]:
            return f"does not divide {key}"
    return message.split(":")[0]


def _why_none(
    config: ExperimentConfig, ranks: int, gpu: str, refused: Counter[str], smallest: float | None, room: float
) -> str:
    T, batch = config.sequence_length, config.data_loader.global_batch_size
    if smallest is not None:
        return (
            f"--gpus {ranks}: no layout fits: the smallest needs {smallest / 1e9:.1f} GB of the {room / 1e9:.1f} GB that "
            f"tensors may take of a {gpu}; use more GPUs, or a smaller model or dataset.sequence_length"
        )
    sequences = batch // T
    near = [n for n in range(1, ranks + 1) if sequences % n == 0][-1]
    up = -(-sequences // ranks) * ranks * T
    return (
        f"--gpus {ranks}: no layout shares data_loader.global_batch_size={batch} ({sequences} sequences) among them: "
        f"use {near} GPUs, or data_loader.global_batch_size={up} (refused: "
        f"{'; '.join(f'{n} x {reason}' for reason, n in refused.most_common(3))})"
    )
