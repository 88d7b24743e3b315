"""vLLM's OLMoE, each layer of which knows its rule."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.olmoe import OlmoeDecoderLayer, OlmoeForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from .modeling_spattn_olmoe import AttentionRule
from .vllm_plugin import local_rule, mask_mod, require_vllms_constants


class SPAttnOlmoeDecoderLayer(OlmoeDecoderLayer):
    """A layer of vLLM's OLMoE. Its attention carries the rule of the heads that this rank holds."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, attention = vllm_config.model_config.hf_config, self.self_attn
        whole = AttentionRule.from_config(config.attention_rules[extract_layer_index(prefix)])
        attention.attn.attention_rule = local_rule(whole, attention.num_heads, attention.tp_rank)
        if current_platform.is_cpu():
            _require_head_size(attention.attn)
        else:
            _require_flex(attention.attn)
            attention.attn.logical_mask_mod = mask_mod(attention.attn.attention_rule, current_platform.device_type)


class SPAttnOlmoeForCausalLM(OlmoeForCausalLM):
    """The model that ``config.json`` of an export names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        require_vllms_constants(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SPAttnOlmoeDecoderLayer)


def _require_head_size(attention: Any) -> None:
    """vLLM's CPU attention has kernels for some head sizes, and names the others only at the first prompt."""
    sizes = attention.get_attn_backend().get_supported_head_sizes()
    if attention.head_size not in sizes:
        raise ValueError(
            f"head_dim={attention.head_size}: vLLM serves {', '.join(map(str, sizes))} on a CPU; use transformers for this model"
        )


def _require_flex(attention: Any) -> None:
    """On a GPU only FlexAttention reads a layer's mask, and only where it makes block masks page by page."""
    from vllm.v1.attention.backends.flex_attention import FlexAttentionMetadata

    name = attention.get_attn_backend().get_name()
    if name != "FLEX_ATTENTION":
        raise ValueError(f"attention backend {name} would be dense: start vLLM with --attention-backend FLEX_ATTENTION")

    def refuse(self: Any) -> None:
        raise ValueError("FlexAttention would judge all heads by the first: set --block-size to its kv_block_size")

    FlexAttentionMetadata.build_block_mask = refuse
