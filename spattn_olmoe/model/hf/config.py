"""The ``config.json`` of transformers for an OLMo-core model, and whether another one describes the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.moe.router import MoERouterGatingFunction
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerBlockType, TransformerConfig

from ...json_files import check_shape
from ...serving.modeling_spattn_olmoe import NO_DROPOUT, SPAttnOlmoeConfig, SPAttnOlmoeForCausalLM
from ..section import layer_patterns
from .rules import is_dense, rule_of

MODELING_FILE = "modeling_spattn_olmoe.py"


def hf_config(
    model: TransformerConfig, *, max_length: int, eos_token_id: int, pad_token_id: int, dtype: str
) -> dict[str, Any]:
    """The contents of an export's ``config.json``. Dense models are plain ``olmoe``, which every tool reads.

    :param max_length: tokens of a training sequence, ``max_position_embeddings``.
    :raises ValueError: the model is not the published OLMoE, or a layer's mask cannot be exported.
    """
    block = published_block(model)
    mixer, moe, norm = block.sequence_mixer, block.feed_forward_moe, block.layer_norm
    assert isinstance(mixer, AttentionConfig) and mixer.rope is not None and moe is not None
    assert norm is not None and norm.eps is not None
    theta = float(mixer.rope.theta)
    return {
        **_identity(model),
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": moe.hidden_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "rms_norm_eps": norm.eps,
        "rope_theta": theta,  # of transformers 4 and of other engines
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "clip_qkv": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": max_length,
        "initializer_range": model.init_std,
        "router_aux_loss_coef": moe.lb_loss_weight or 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "use_cache": True,
    }


def _identity(model: TransformerConfig) -> dict[str, Any]:
    """The architecture, and under patterns everything that states what is attended."""
    patterns = list(layer_patterns(model))
    rules = [rule_of(pattern) for pattern in patterns]
    if all(map(is_dense, rules)):
        return {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "attention_dropout": 0.0}
    module, name = MODELING_FILE.removesuffix(".py"), SPAttnOlmoeForCausalLM.__name__
    return {
        "model_type": SPAttnOlmoeConfig.model_type,
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"{module}.{SPAttnOlmoeConfig.__name__}",
            "AutoModelForCausalLM": f"{module}.{name}",
        },
        "attention_patterns": [pattern.to_config() for pattern in patterns],
        "attention_rules": [rule.to_config() for rule in rules],
        "attention_dropout": NO_DROPOUT,
    }


# ---- is another config the same model? -------------------------------------------------------------------------------

_DEFAULTS = {
    "intermediate_size": 2048,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "clip_qkv": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "eos_token_id": 50279,
    "pad_token_id": 1,
    "bos_token_id": None,
}
"""What transformers takes for a key of OLMoE that ``config.json`` leaves out."""

_NOT_OF_THE_MODEL = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
    *("output_router_logits", "router_aux_loss_coef", "return_dict", "output_hidden_states", "output_attentions"),
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "quantization_config"),
}
"""Keys that say nothing of what the weights compute, or are compared by a rule of their own."""


_SHAPES: dict[str, Any] = {
    "rope_theta": float,
    "rope_parameters": ({"rope_theta": float, "rope_type": str}, None),
    "max_position_embeddings": int,
}
"""What the values must be that are more than compared."""


def require_same_model(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str, yaml: str) -> None:
    """Raise unless a ``config.json`` describes the model that a YAML config describes, key by key.

    :param found: the file's content; ``wanted``: what :func:`hf_config` makes of the YAML's model.
    :raises ValueError: naming the key, both values and what to do.
    """
    check_shape(found, {key: shape for key, shape in _SHAPES.items() if key in found}, path)
    for key in ("model_type", "architectures"):
        if found.get(key) != wanted[key]:
            raise ValueError(
                f"{path}: {key}={found.get(key)!r} is another architecture: only {wanted[key]!r} can be imported"
            )
    if found.get("quantization_config") is not None:
        raise ValueError(f"{path}: quantization_config is set: give the weights that were not quantized")
    for key, value in _normalized(wanted).items():
        its = _normalized(found).get(key, _DEFAULTS.get(key))
        if its != value:
            raise ValueError(f"{path}: {key}={its!r} but {yaml} has {value!r}: they are different models")
    length, needed = (
        found.get("max_position_embeddings", wanted["max_position_embeddings"]),
        wanted["max_position_embeddings"],
    )
    if length < needed:
        raise ValueError(
            f"{path}: max_position_embeddings={length} is less than dataset.sequence_length={needed} of {yaml}: set that lower"
        )
    for key, value in found.items():
        if key not in wanted and key not in _DEFAULTS and key not in _NOT_OF_THE_MODEL and value not in (None, False):
            raise ValueError(f"{path}: {key}={value!r} is not a key of the published OLMoE: it would be lost")


def _normalized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are compared, rope as three and key heads as a number."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"} | (
        config.get("rope_parameters") or {}
    )
    scaling = config.get("rope_scaling")
    out = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    if out.get("num_key_value_heads") is None:
        out["num_key_value_heads"] = out.get("num_attention_heads")
    return out | {"rope_theta": float(rope["rope_theta"]), "rope_type": rope["rope_type"], "rope_scaling": scaling}


# ---- is a model the published one? -----------------------------------------------------------------------------------


def published_block(model: TransformerConfig) -> TransformerBlockConfig:
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
