"""OLMo-core's two stacks for a mixture of experts, and the same model in the second one.

``v1`` is ``MoETransformer`` with ``TransformerTrainModule``, which the published OLMoE was trained with. ``ddp`` is OLMoDDP,
where OLMo-core's authors work now. A config describes its model in v1's words for both: attention section, fingerprint,
evaluation and export know one model, and :func:`ddp_model` is where the second stack's config is made of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cached_path import cached_path
from olmo_core.config import Config, StrEnum
from olmo_core.nn.ddp.block import OLMoDDPTransformerBlockConfig
from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
from olmo_core.nn.moe.v2.ep_config import ExpertParallelConfig, ExpertParallelPath
from olmo_core.nn.moe.v2.routed_experts import RoutedExpertsConfig
from olmo_core.nn.moe.v2.router import MoERouterConfigV2
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerBlockType, TransformerConfig, TransformerType
from olmo_core.nn.transformer.config import OLMoDDPModelConfig

from ..json_files import read_json

KEEPS_ALL_TOKENS = (ExpertParallelPath.sync_1d,)
"""Ways of exchanging tokens that leave none out. The others have room for ``capacity_factor`` times a rank's even share."""


class Stack(StrEnum):
    """Which of OLMo-core's implementations trains the model."""

    v1 = "v1"
    ddp = "ddp"


@dataclass
class DDPOptions(Config):
    """What only the stack ``ddp`` knows; v1 does not read it.

    :param ep: how expert-parallel ranks exchange tokens, OLMo-core's own section; see :data:`KEEPS_ALL_TOKENS`.
    :param recompute_each_block: compute each block again in the backward pass instead of keeping its activations.
    """

    ep: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    recompute_each_block: bool = False

    @property
    def may_drop_tokens(self) -> bool:
        """Whether expert parallelism may leave out tokens of a rank that too many choose."""
        return self.ep.path not in KEEPS_ALL_TOKENS


def stack_of(checkpoint: str) -> Stack:
    """The stack whose weights a checkpoint holds, as its ``config.json`` states; v1 where it states none, as older ones do.

    :raises ValueError: that file is damaged.
    """
    path = f"{checkpoint.rstrip('/')}/config.json"
    try:
        return stated_stack(read_json(cached_path(path), dict), path)
    except FileNotFoundError:
        return Stack.v1


def stated_stack(config: Mapping[str, Any], path: str) -> Stack:
    """:func:`stack_of` from the content of ``config.json``; ``path`` names it in errors."""
    stated = config.get("stack", Stack.v1)
    if stated not in list(Stack):
        raise ValueError(f"{path}: stack is {stated!r}, which is none of {', '.join(Stack)}: restore the file")
    return Stack(stated)


def require_stack(checkpoint: str, stack: Stack) -> None:
    """Raise where a checkpoint holds the weights of the other stack: no name of its experts would be found."""
    if (found := stack_of(checkpoint)) != stack:
        raise ValueError(
            f"checkpoint {checkpoint} holds weights of stack={found} but this config has stack={stack}: set stack={found}, or "
            f"convert it first: python scripts/convert_stack.py --checkpoint {checkpoint} --to NEW_FOLDER --stack {stack}"
        )


def ddp_model(model: TransformerConfig, options: DDPOptions) -> OLMoDDPModelConfig:
    """The config of the same model in the stack ``ddp``: the same function of the same weights under other names.

    :param model: of v1, with attention patterns in it.
    :raises ValueError: something in it has no counterpart there.
    """
    if not isinstance(model.block, TransformerBlockConfig):
        raise ValueError("model.block must be one block for all layers: named blocks are not supported")
    require_defaults(
        model,
        "model",
        *("d_model", "vocab_size", "n_layers", "block", "block_overrides", "lm_head", "name", "dtype"),
        *("init_method", "init_seed", "init_std", "embedding_init_std"),
    )
    overrides = {layer: _block(own, model, options) for layer, own in (model.block_overrides or {}).items()}
    return OLMoDDPModelConfig(
        name=TransformerType.moe_fused_v2,
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        n_layers=model.n_layers,
        block=_block(model.block, model, options),
        block_overrides=overrides or None,  # type: ignore[arg-type]  # a dict of the subclass
        lm_head=copy.deepcopy(model.lm_head),
        dtype=model.dtype,
        init_method=model.init_method,
        init_seed=model.init_seed,
        init_std=model.init_std,
        embedding_init_std=model.embedding_init_std,
        recompute_each_block=options.recompute_each_block,
    )


def _block(
    block: TransformerBlockConfig, model: TransformerConfig, options: DDPOptions
) -> OLMoDDPTransformerBlockConfig:
    """A pre-norm block of v1 with dropless experts."""
    if block.name != TransformerBlockType.moe:
        raise ValueError(f"model.block.name={block.name}: stack=ddp has the pre-norm block only: use moe, or stack=v1")
    require_defaults(block, "model.block", "sequence_mixer", "layer_norm", "feed_forward_moe", "name")
    moe = block.feed_forward_moe
    if moe is None or moe.name != MoEType.dropless:
        raise ValueError("model.block.feed_forward_moe.name must be dropless for stack=ddp, or use stack=v1")
    return OLMoDDPTransformerBlockConfig(
        name=TransformerBlockType.moe_fused_v2,
        sequence_mixer=copy.deepcopy(block.sequence_mixer),
        layer_norm=copy.deepcopy(block.layer_norm),
        use_pre_norm=True,
        routed_experts=RoutedExpertsConfig(
            d_model=model.d_model,
            hidden_size=moe.hidden_size,
            num_experts=moe.num_experts,
            bias=False,
            dtype=moe.dtype,
        ),
        routed_experts_router=_router(moe, model),
        ep=copy.deepcopy(options.ep),
    )


def _router(moe: MoEConfig, model: TransformerConfig) -> MoERouterConfigV2:
    """The router, with the weights of its losses divided by the layers: the stack ``ddp`` does not do that itself."""
    require_defaults(
        moe,
        "model.block.feed_forward_moe",
        *("name", "num_experts", "hidden_size", "router", "dtype"),
        *("lb_loss_weight", "lb_loss_granularity", "z_loss_weight", "scale_loss_by_num_layers"),
    )
    router: MoERouterConfig = moe.router
    shared = ("top_k", "jitter_eps", "normalize_expert_weights", "gating_function", "dtype")
    require_defaults(router, "model.block.feed_forward_moe.router", "name", *shared)
    layers = model.n_layers if moe.scale_loss_by_num_layers else 1
    return MoERouterConfigV2(
        d_model=model.d_model,
        num_experts=moe.num_experts,
        **{key: getattr(router, key) for key in shared},
        lb_loss_weight=None if moe.lb_loss_weight is None else moe.lb_loss_weight / layers,
        lb_loss_granularity=moe.lb_loss_granularity,
        z_loss_weight=None if moe.z_loss_weight is None else moe.z_loss_weight / layers,
    )


def require_defaults(config: Any, where: str, *carried: str, known: Collection[str] = ()) -> None:
    """Raise at the first key of an OLMo-core config that is set and has no counterpart in the stack ``ddp``.

    :param carried: the keys that have one; ``known``: keys that say nothing of what is trained.
    """
    for f in dataclasses.fields(config):
        if f.name in carried or f.name in known:
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = getattr(config, f.name)
        if value is not None and value is not False and value != default:
            raise ValueError(
                f"{where}.{f.name}={value}: stack=ddp has no place for it: leave it unset, or use stack=v1"
            )
