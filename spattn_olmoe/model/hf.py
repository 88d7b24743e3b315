"""The same model in transformers: weights from and to ``OlmoeForCausalLM``, and its attention under a pattern.

Transformers' OLMoE is the published, pre-norm one; so are the models of this project's configs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import torch
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.moe.router import MoERouterGatingFunction
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerBlockType, TransformerConfig
from torch import Tensor

from ..kernels import cached_attention
from ..patterns import Pattern, build_pattern
from .mixer import PatternAttentionConfig
from .section import layer_patterns

IMPLEMENTATION = "spattn_olmoe"
"""The value of ``config._attn_implementation`` with which transformers attends under our patterns."""

_BLOCK = {
    "attention.w_q.weight": "self_attn.q_proj.weight",
    "attention.w_k.weight": "self_attn.k_proj.weight",
    "attention.w_v.weight": "self_attn.v_proj.weight",
    "attention.w_out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
_MODEL = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_ROUTER, _EXPERTS = "feed_forward_moe.router.weight", "feed_forward_moe.experts.mlp"


def from_transformers(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Weights of ``OlmoeForCausalLM.state_dict()`` under OLMo-core's names and in its shapes."""
    out = {ours: state[theirs] for ours, theirs in _MODEL.items()}
    for i in range(n_layers):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        out.update({block + ours: state[layer + theirs] for ours, theirs in _BLOCK.items()})
        gate, up = state[layer + "mlp.experts.gate_up_proj"].chunk(2, dim=1)  # (experts, hidden, d_model) each
        down = state[layer + "mlp.experts.down_proj"]  # (experts, d_model, hidden)
        out[block + _ROUTER] = state[layer + "mlp.gate.weight"].flatten()
        out[block + f"{_EXPERTS}.w1"] = gate.flatten(0, 1)
        out[block + f"{_EXPERTS}.w3"] = up.flatten(0, 1)
        out[block + f"{_EXPERTS}.w2"] = down.transpose(1, 2).flatten(0, 1)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def to_transformers(state: dict[str, Tensor], model: TransformerConfig) -> dict[str, Tensor]:
    """Weights of an OLMo-core model as ``OlmoeForCausalLM.load_state_dict`` takes them."""
    moe = _published_block(model).feed_forward_moe
    assert moe is not None
    E = moe.num_experts
    out = {theirs: state[ours] for ours, theirs in _MODEL.items()}
    for i in range(model.n_layers):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        out.update({layer + theirs: state[block + ours] for ours, theirs in _BLOCK.items()})
        w1, w2, w3 = (state[block + f"{_EXPERTS}.{w}"].unflatten(0, (E, -1)) for w in ("w1", "w2", "w3"))
        out[layer + "mlp.gate.weight"] = state[block + _ROUTER].view(E, -1)
        out[layer + "mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        out[layer + "mlp.experts.down_proj"] = w2.transpose(1, 2)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def transformers_config(model: TransformerConfig, *, max_length: int, eos_token_id: int, pad_token_id: int) -> Any:
    """The ``OlmoeConfig`` of a model config, its patterns included.

    :raises ValueError: the model is not the published OLMoE, which is all that transformers can be.
    """
    from transformers import OlmoeConfig

    block = _published_block(model)
    mixer, moe, norm = block.sequence_mixer, block.feed_forward_moe, block.layer_norm
    assert isinstance(mixer, PatternAttentionConfig) and mixer.rope is not None and moe is not None
    assert norm is not None and norm.eps is not None
    config = OlmoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=moe.hidden_size,
        num_hidden_layers=model.n_layers,
        num_attention_heads=mixer.n_heads,
        num_key_value_heads=mixer.n_kv_heads or mixer.n_heads,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.router.top_k,
        max_position_embeddings=max_length,
        rms_norm_eps=norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(mixer.rope.theta)},
        norm_topk_prob=False,
        router_aux_loss_coef=moe.lb_loss_weight or 0.0,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    config.attention_patterns = [pattern.to_config() for pattern in layer_patterns(model)]
    return config


def _published_block(model: TransformerConfig) -> TransformerBlockConfig:
    """The block of every layer.

    :raises ValueError: something in the model that ``OlmoeForCausalLM`` has no place for would be lost.
    """
    block = model.block
    if not isinstance(block, TransformerBlockConfig) or block.name != TransformerBlockType.moe:
        raise ValueError("model.block.name must be 'moe' (pre-norm): transformers has no other OLMoE")
    for layer, own in (model.block_overrides or {}).items():
        if replace(own, sequence_mixer=block.sequence_mixer) != block:
            raise ValueError(f"model.block_overrides: layer {layer} differs in more than its attention type")
    mixers = [b.sequence_mixer for b in (block, *(model.block_overrides or {}).values())]
    for mixer in mixers:
        _require_published_mixer(mixer, model.d_model)
    if len({(m.n_heads, m.n_kv_heads) for m in mixers if isinstance(m, AttentionConfig)}) > 1:
        raise ValueError("model.block_overrides: transformers wants equally many heads in all layers")
    moe, norm, head = block.feed_forward_moe, block.layer_norm, model.lm_head
    rms = [(f"{where}layer_norm", n) for where, n in (("model.block.", norm), ("model.lm_head.", head.layer_norm))]
    rms += [("model.block.sequence_mixer.qk_norm", m.qk_norm) for m in mixers if isinstance(m, AttentionConfig)]
    for name, one in rms:
        if one is None or norm is None or one.name != LayerNormType.rms or one.bias is not False or one.eps != norm.eps:
            raise ValueError(f"{name} must be rms without bias, with one eps for all, as in OLMoE")
    router = moe.router if moe is not None else None
    others = {
        "model.block.feed_forward_moe": (moe is not None, "set"),
        "model.block.feed_forward_moe.shared_mlp": (moe is None or moe.shared_mlp is None, "null"),
        "model.block.feed_forward_moe.latent_moe": (moe is None or moe.latent_moe is None, "null"),
        "model.block.feed_forward_moe.router.normalize_expert_weights": (
            router is None or router.normalize_expert_weights is None,
            "null",
        ),
        "model.block.feed_forward_moe.router.bias_gamma": (router is None or router.bias_gamma is None, "null"),
        "model.block.feed_forward_moe.router.gating_function": (
            router is None or router.gating_function == MoERouterGatingFunction.softmax,
            "softmax",
        ),
        "model.lm_head.bias": (head.bias is False, "false"),
        "model.embedding_norm": (model.embedding_norm is None, "null"),
        "model.embed_scale": (model.embed_scale is None, "null"),
        "model.tie_word_embeddings": (not model.tie_word_embeddings, "false"),
    }
    _require(others)
    return block


def _require_published_mixer(mixer: Any, d_model: int) -> None:
    if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
        raise ValueError("model.block.sequence_mixer must be attention with rope, as in OLMoE")
    rope = mixer.rope
    wanted = {
        "bias": (mixer.bias is False, "false"),
        "gate": (mixer.gate is None, "null"),
        "clip_qkv": (mixer.clip_qkv is None, "null"),
        "use_head_qk_norm": (not mixer.use_head_qk_norm, "false"),
        "head_dim": (mixer.head_dim in (None, d_model // mixer.n_heads), "d_model / n_heads"),
        "rope.scaling": (rope.scaling is None, "null"),
        "rope.partial_rotary_factor": (rope.partial_rotary_factor == 1.0, "1"),
    }
    _require({f"model.block.sequence_mixer.{key}": value for key, value in wanted.items()})


def _require(conditions: dict[str, tuple[bool, str]]) -> None:
    for key, (met, value) in conditions.items():
        if not met:
            raise ValueError(f"{key} must be {value}, as in OLMoE: transformers has no place for it")


def register_with_transformers() -> None:
    """Let transformers attend under patterns: ``config._attn_implementation = "spattn_olmoe"``.

    The patterns are those of ``config.attention_patterns``, one a layer. Left padding and KV caches are honoured.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    # Without a mask of its own name transformers would hand over none at all, and padding would be attended.
    AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: heads before positions in, positions before heads out."""
    pattern = _pattern(json.dumps(module.config.attention_patterns[module.layer_idx]))
    leftpad = None
    if attention_mask is not None:
        valid = attention_mask.bool()
        leftpad = valid.long().argmax(-1)
        if not bool((valid.cumsum(-1).bool() == valid).all()):
            raise ValueError(
                "attention_mask has padding that is not on the left: pad on the left (padding_side='left')"
            )
    S, T = key.shape[2], query.shape[2]
    if pattern.follows_input and T != S:
        raise ValueError("attention.follows_input=true cannot be used with a KV cache: generate with use_cache=False")
    out = cached_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        _fixed(pattern, S) if pattern.follows_input else pattern,
        start=S - T,
        leftpad=leftpad,
        scale=scaling,
    )
    return out, None


@functools.cache
def _pattern(config: str) -> Pattern:
    return build_pattern(**json.loads(config))


def _fixed(pattern: Pattern, T: int) -> Pattern:
    """A pattern that follows its input's length, held at one length."""
    return build_pattern(**{**pattern.at_length(T).to_config(), "follows_input": False})
