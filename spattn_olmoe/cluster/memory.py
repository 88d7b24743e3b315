"""Memory of one GPU in training, by part, counted from the tensors that OLMo-core and autograd keep.

Three moments can be the fullest: the loss, with the logits; the backward pass of the last block, with every other block's
activations still there; the optimiser's step. The peak is the fullest of them. What is counted, and how far it is from
real allocations, stands in docs/cluster.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from olmo_core.config import DType
from olmo_core.nn.moe import MoEType
from olmo_core.nn.transformer import Transformer, TransformerBlockConfig, TransformerBlockType

from ..model.mixer import PatternAttentionConfig
from ..train.config import ExperimentConfig
from ..train.layout import RECOMPUTABLE, Layout

BYTES = {DType.float32: 4, DType.bfloat16: 2, DType.float16: 2}

USABLE = 0.90
"""Share of a GPU's memory that tensors may fill: the rest is for CUDA's context, NCCL's buffers, fragmentation. An assumption."""

IMBALANCE = 1.25
"""Rows of the busiest rank, of an even share, where ranks share experts. An assumption."""

EXPERTS = ".experts."
_CUT_BY_TENSOR_PARALLELISM = (EXPERTS, "embeddings.", "lm_head.w_out", ".w_q.", ".w_k.", ".w_v.", ".attention.w_out.")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    :param moments: for each moment that may be the peak, bytes by part.
    :param activations: bytes that one token of a rank leaves for the backward pass, by part, over all layers.
    """

    moments: Mapping[str, Mapping[str, float]]
    activations: Mapping[str, float]

    @property
    def moment(self) -> str:
        """The fullest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        """Bytes by part at the fullest moment."""
        return self.moments[self.moment]

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Shape:
    """What the model's memory and work depend on, read from its config and from the model on the meta device.

    :param weights: shape of every parameter by name.
    :param compute: bytes of a number in the forward pass; ``master``: of a weight as the optimiser sees it.
    """

    d_model: int
    vocab: int
    layers: int
    heads: int
    query: int
    key: int
    top_k: int
    experts: int
    hidden: int
    qk_norm: bool
    weights: Mapping[str, tuple[int, ...]]
    compute: int
    master: int
    reduce: int

    @classmethod
    def of(cls, config: ExperimentConfig, model: Transformer | None = None) -> Shape:
        """Read a config's model.

        :param model: the built model, to build it only once.
        :raises ValueError: a part of the model that the estimate does not know.
        """
        model_config = config.model_with_attention()
        block = model_config.block
        assert isinstance(block, TransformerBlockConfig)  # attach() refuses others
        mixer, moe, dp = block.sequence_mixer, block.feed_forward_moe, config.train_module.dp_config
        if block.name != TransformerBlockType.moe or moe is None or moe.name != MoEType.dropless:
            raise ValueError(f"model.block.name={block.name}: only pre-norm blocks with dropless experts are modelled")
        for key, value in {
            "model.block.feed_forward_moe.shared_mlp": moe.shared_mlp,
            "model.block.feed_forward_moe.latent_moe": moe.latent_moe,
            "train_module.autocast_precision": config.train_module.autocast_precision,
            "train_module.float8_config": config.train_module.float8_config,
        }.items():
            if value is not None:
                raise ValueError(f"{key} is not modelled: unset it to plan")
        assert isinstance(mixer, PatternAttentionConfig)
        model = model or model_config.build(init_device="meta")
        head_dim = mixer.head_dim or model_config.d_model // mixer.n_heads
        return cls(
            d_model=model_config.d_model,
            vocab=model_config.vocab_size,
            layers=model_config.n_layers,
            heads=mixer.n_heads,
            query=head_dim * mixer.n_heads,
            key=head_dim * (mixer.n_kv_heads or mixer.n_heads),
            top_k=moe.router.top_k,
            experts=moe.num_experts,
            hidden=moe.hidden_size,
            qk_norm=mixer.qk_norm is not None,
            weights={name: tuple(weight.shape) for name, weight in model.named_parameters()},
            compute=BYTES[(dp.param_dtype if dp is not None else None) or model_config.dtype],
            master=BYTES[model_config.dtype],
            reduce=BYTES[dp.reduce_dtype] if dp is not None else BYTES[model_config.dtype],
        )

    def count(self, *within: str) -> int:
        """Parameters whose names contain any of some parts."""
        return sum(math.prod(shape) for name, shape in self.weights.items() if any(part in name for part in within))


def memory(config: ExperimentConfig, layout: Layout, shape: Shape | None = None) -> Memory:
    """Estimate the memory of one GPU.

    :param shape: what :meth:`Shape.of` gives, to count a model only once.
    :raises ValueError: the config has a part that the estimate does not know.
    """
    shape = shape or Shape.of(config)
    if layout.data_parallel == "ddp":  # OLMo-core casts the model, so everything is in the compute dtype
        shape = replace(shape, master=shape.compute, reduce=shape.compute)
    elif layout.data_parallel is None:
        shape = replace(shape, compute=shape.master)
    weights = shape.master * local_parameters(shape, layout)
    optimiser = 2 * weights  # two moments of Adam
    kept = kept_per_token(shape, layout)
    tokens = layout.tokens
    activations = {name: tokens * size for name, size in kept.items()}
    casts = _casts(shape) + 8 * config.sequence_length * shape.query // shape.heads
    head = shape.d_model * shape.vocab / layout.tensor
    block = max(_of_block(shape, layout, i) for i in range(shape.layers))
    fsdp = layout.data_parallel in ("fsdp", "hsdp")

    logits = tokens * shape.vocab
    states = {"weights": weights, "gradients": weights, "optimiser": optimiser}
    # Blocks give their gathered weights back after the forward pass; the head keeps its own until it has gone backward.
    # With other ranks, FSDP2 gathers one block ahead in the backward pass.
    ahead = 1 if layout.ranks > 1 else 0
    gathered_at_loss = shape.compute * (head + ahead * block) if fsdp else 0
    gathered_at_block = shape.compute * (1 + ahead) * block if fsdp else 0
    buckets = shape.compute * local_parameters(shape, layout) if layout.data_parallel == "ddp" else 0
    at_loss = {
        **states,
        "gradient buckets": buckets,
        "gathered weights": gathered_at_loss,
        **activations,
        "rotary tables, casts": casts,
        "logits and loss": 12 * logits,  # log-softmax, its gradient and that of the logits, all in float32
    }
    # Each reduction holds the gradients of the head, or of a block, as computed and as they are summed.
    reduced = (shape.compute + shape.reduce) * max(head, block) if fsdp else 0
    at_block = {
        **states,
        "gradient buckets": buckets,
        "gathered weights": gathered_at_block,
        **activations,
        "rotary tables, casts": casts,
        "gradients before reduction": reduced,
        "workspace of a block": tokens * _block_workspace(shape, layout),
    }
    at_step: dict[str, float] = {
        **states,
        "gradient buckets": buckets,
        "workspace of the optimiser": weights,
    }  # multi-tensor AdamW: the root of a moment
    moments: dict[str, dict[str, float]] = {
        "the loss": at_loss,
        "the last block's backward": at_block,
        "the optimiser's step": at_step,
    }
    return Memory({name: {k: v for k, v in parts.items() if v} for name, parts in moments.items()}, kept)


def local_parameters(shape: Shape, layout: Layout, *within: str) -> int:
    """Parameters that rank 0 holds, as FSDP cuts them: whole rows of the first dimension, rounded up."""
    total = 0
    for name, size in shape.weights.items():
        if within and not any(part in name for part in within):
            continue
        rows, shards = size[0], layout.shards
        if EXPERTS in name and layout.expert > 1:
            rows, shards = rows // layout.expert, layout.replicas
        elif any(part in name for part in _CUT_BY_TENSOR_PARALLELISM):
            # Tensor parallelism cuts some of them by columns; the number per rank is the same.
            rows = rows // layout.tensor
        total += -(-rows // shards) * math.prod(size[1:])
    return total


def kept_per_token(shape: Shape, layout: Layout) -> dict[str, float]:
    """Bytes that a token of a rank leaves for the backward pass, over all layers.

    Norms keep their input and the normalised input in float32 and one scale; attention its input, q, k, v, its output and
    a log-sum-exp per head; the router its input in float32, two scores per expert and its choice; experts, for each of
    ``top_k`` rows, input, four of the hidden size, and output.
    """
    c, d, E, k = shape.compute, shape.d_model, shape.experts, shape.top_k

    def norm(width: int) -> float:
        return 8 * width + 4

    rows = k * (IMBALANCE if layout.expert * layout.tensor > 1 else 1.0)
    # The input of projections is whole on every rank of tensor parallelism.
    norms_of_qk = norm(shape.query) + norm(shape.key) if shape.qk_norm else 0
    per_layer = {
        "attention_norm": norm(d),
        "attention": c * d * layout.tensor + norms_of_qk + c * (2 * shape.query + 2 * shape.key) + 4 * shape.heads,
        "feed_forward_norm": norm(d),
        "router": 4 * d + 8 * E + 4 + 8 * k,
        "feed_forward_moe.experts": c * rows * (2 * d + 4 * shape.hidden) + 20 * k,
    }
    inputs = {  # what a part keeps where it is computed again: its input
        "attention_norm": c * d,
        "attention": c * d,
        "feed_forward_norm": c * d,
        "feed_forward_moe.experts": (c * d if c < 4 else 0) + 12 * k,
    }
    for part in RECOMPUTABLE:
        if part in layout.recomputed:
            per_layer[part] = min(per_layer[part], inputs[part])
    total = {f"activations: {_WORDS[part]}": 0.0 for part in per_layer}
    for part, size in per_layer.items():
        total[f"activations: {_WORDS[part]}"] += shape.layers * size
    total["activations: embedding and head"] = (
        8 + norm(d) + c * d * layout.tensor
    )  # ids, the final norm, the head's input
    return total


_WORDS = {
    "attention_norm": "norms",
    "feed_forward_norm": "norms",
    "attention": "attention",
    "router": "router",
    "feed_forward_moe.experts": "experts and dispatch",
}


def _casts(shape: Shape) -> float:
    """Bytes of norms' and routers' weights in float32 that the backward pass keeps where they are computed in less."""
    if shape.compute == 4:
        return 0
    return 4 * shape.count("norm.", "router.")


def _block_workspace(shape: Shape, layout: Layout) -> float:
    """Bytes a token that the backward pass of one block has in passing: gradients of its experts' rows."""
    c, d, h = shape.compute, shape.d_model, shape.hidden
    rows = shape.top_k * (IMBALANCE if layout.expert * layout.tensor > 1 else 1.0)
    gradients = c * rows * (2 * d + 3 * h) + 8 * d
    again = layout.recomputed & {"feed_forward_moe.experts"}
    return gradients + (c * rows * (2 * d + 4 * h) if again else 0)


def _of_block(shape: Shape, layout: Layout, index: int) -> float:
    """Parameters of a block as a rank computes with them: gathered by FSDP, cut by tensor and expert parallelism."""
    prefix = f"blocks.{index}."
    total = 0.0
    for name, size in shape.weights.items():
        if not name.startswith(prefix):
            continue
        cut = layout.expert if EXPERTS in name and layout.expert > 1 else 1
        if any(part in name for part in _CUT_BY_TENSOR_PARALLELISM):
            cut = max(cut, layout.tensor)
        total += math.prod(size) / cut
    return total


def checkpoint_bytes(config: ExperimentConfig, shape: Shape | None = None) -> float:
    """Bytes of a checkpoint: the weights and two moments of Adam, in the dtype that they are trained in."""
    shape = shape or Shape.of(config)
    dp = config.train_module.dp_config
    size = shape.compute if dp is not None and dp.name == "ddp" else shape.master
    return 3 * size * shape.count("")
