"""Expected time of a step, from counted work, a stated machine and stated assumptions: an estimate, never a measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..machine import GPU
from ..model.section import layer_patterns
from ..patterns import Pattern, interval_table
from ..train.config import ExperimentConfig
from ..train.layout import Layout
from .machines import GPUS_PER_NODE, assumed
from .memory import EXPERTS, Shape, kept_per_token, local_parameters

TILE = (128, 64)
"""Queries and keys of a tile of the fused kernels: attention computes every tile that holds an attended pair."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a token, forward and backward, by kind.

    :param attention: of the tiles that are visited, which is more than of the pairs that are attended.
    """

    projections: float
    experts: float
    attention: float

    @classmethod
    def of(cls, config: ExperimentConfig, shape: Shape) -> Work:
        """Count a model's work at the length of training."""
        T = config.sequence_length
        head_dim = shape.query // shape.heads
        pairs = sum(tile_pairs(pattern, T) for pattern in layer_patterns(config.model_with_attention()))
        dense = shape.count(".attention.w_", "router.", "lm_head.w_out")
        return cls(
            projections=6 * dense,
            experts=6 * shape.count(EXPERTS) * shape.top_k / shape.experts,
            attention=12 * head_dim * pairs / T,
        )


def tile_pairs(pattern: Pattern, T: int) -> int:
    """Pairs in the tiles that the kernels visit; the attended pairs where a mask is no function of distance."""
    table = interval_table(pattern)
    if table is None:
        return pattern.attended_pairs(T)
    rows, columns = TILE
    total = 0
    for lo, hi in (interval for head in table for interval in head):
        for first in range(0, T if lo < hi else 0, rows):
            last = min(first + rows, T) - 1
            keys = last - lo + 1 - max(first - hi + 1, 0)
            total += rows * columns * -(-max(keys, 0) // columns)
    return total


@dataclass(frozen=True)
class Speed:
    """A step's expected time.

    :param parts: seconds by part; those of communication that is hidden behind computing are not among them.
    :param tokens: tokens of a step.
    :param mfu: model FLOPs utilisation: exact FLOPs of the model over peak.
    """

    parts: Mapping[str, float]
    tokens: int
    mfu: float

    @property
    def seconds(self) -> float:
        """Seconds a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds


def speed(config: ExperimentConfig, layout: Layout, gpu: GPU, shape: Shape, work: Work, flops: float) -> Speed:
    """Estimate a step.

    :param flops: of a token, exact for the mask, as :func:`spattn_olmoe.model.flops.flops_per_token` counts them.
    """
    batch = config.data_loader.global_batch_size
    microbatches = batch / (layout.data_ranks * layout.microbatch)
    n, c, d, k, L = layout.tokens, shape.compute, shape.d_model, shape.top_k, shape.layers

    # What is computed again adds a forward pass, a third of forward and backward.
    attention_again = 4 / 3 if "attention" in layout.recomputed else 1
    experts_again = 4 / 3 if "feed_forward_moe.experts" in layout.recomputed else 1
    uneven = assumed("imbalance") if layout.expert * layout.tensor > 1 else 1
    kept = kept_per_token(shape, replace(layout, recomputed=frozenset()))
    compute = {
        "projections": n * work.projections / (gpu.flops * assumed("projections")),
        "experts": n * uneven * experts_again * work.experts / (gpu.flops * assumed("experts")),
        "attention": n * attention_again * work.attention / (gpu.flops * assumed("attention")),
        "norms, activations, dispatch, loss": n
        * assumed("traffic")
        * (sum(kept.values()) + 4 * shape.vocab)
        / (gpu.hbm * assumed("hbm")),
    }
    busy = sum(compute.values())

    def collective(size: int, stride: int, received: float, calls: int, pairwise: bool = False) -> float:
        """Seconds that ``calls`` collectives of ``size`` ranks, ``stride`` apart, take for the bytes each rank receives."""
        if size <= 1:
            return 0.0
        in_node = max(1, min(size, GPUS_PER_NODE // stride))
        # Across nodes, a ring passes through the adapters of all its ranks in a node; pairs each use their own.
        wide = gpu.network * (1 if pairwise else in_node)
        bandwidth = gpu.nvlink if size * stride <= GPUS_PER_NODE else min(gpu.nvlink, wide)
        return received / (bandwidth * assumed("links")) + calls * assumed("latency") * math.log2(size)

    # FSDP: weights are gathered forward and backward and gradients scattered, each microbatch, behind the computing.
    inner = layout.tensor * layout.context  # ranks that are next to each other in the mesh
    moved = 2 * c + shape.reduce
    hidden = 0.0
    if layout.data_parallel in ("fsdp", "hsdp"):
        experts_apart = layout.expert > 1
        groups = [(layout.shards, layout.tensor, "dense" if experts_apart else "all")]
        groups += [(layout.replicas, layout.expert, "experts")] if experts_apart else []
        for size, stride, what in groups:
            parameters = _gathered(shape, layout, what)
            hidden += collective(size, stride, moved * parameters * (size - 1) / size, 3 * (L + 2))
    exposed = {}
    if layout.expert * layout.tensor > 1:
        size, stride = (layout.expert, inner) if layout.expert > 1 else (layout.tensor, 1)
        passes = 6 if experts_again > 1 else 4
        received = passes * L * c * n * k * d * (size - 1) / size
        exposed["exchange of experts' rows"] = collective(size, stride, received, passes * L, pairwise=True)
    if layout.context > 1:
        received = 2 * L * c * n * (2 * shape.query + 2 * shape.key) * (layout.context - 1) / layout.context
        exposed["exchange of Ulysses"] = collective(layout.context, layout.tensor, received, 6 * L, pairwise=True)
    if layout.tensor > 1:
        tp = layout.tensor
        received = (
            (4 * L + 2) * c * n * d * (tp - 1)
        )  # gather and scatter of a block's input and output, and the head's
        received += (8 * L * c * n * shape.query + 2 * c * n * shape.vocab) * (tp - 1) / tp  # QK-norm, logits
        exposed["tensor parallelism"] = collective(tp, 1, received, 12 * L)
    waiting = max(0.0, hidden - busy)

    # Once a step: gradients summed over replicas behind the last backward pass, and the optimiser.
    replicas, local = layout.replicas, local_parameters(shape, layout)
    local_dense = local - local_parameters(shape, layout, EXPERTS) if layout.expert > 1 else local
    summed = 2 * shape.reduce * local_dense * (replicas - 1) / replicas
    all_reduce = collective(replicas, inner * layout.shard_degree, summed, 2 * (L + 2))
    parts = {name: microbatches * seconds for name, seconds in {**compute, **exposed}.items()}
    parts["waiting for FSDP"] = microbatches * waiting
    parts["waiting for replicas"] = max(0.0, all_reduce - 2 / 3 * busy)
    parts["optimiser"] = 7 * shape.master * local / (gpu.hbm * assumed("hbm"))
    parts["other"] = assumed("other") * sum(parts.values())
    seconds = sum(parts.values())
    return Speed(
        parts={name: value for name, value in parts.items() if value},
        tokens=batch,
        mfu=flops * batch / (seconds * layout.ranks * gpu.flops),
    )


def _gathered(shape: Shape, layout: Layout, what: str) -> float:
    """Parameters that a rank gathers in a pass over the model."""
    experts = shape.count(EXPERTS) / (layout.tensor * layout.expert)
    if what == "experts":
        return experts
    dense = (shape.count("") - shape.count(EXPERTS)) / layout.tensor
    return dense if what == "dense" else dense + experts
