"""The ``config.json`` of transformers for an OLMo-core model, and whether another one describes the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.nn.moe import MoEConfig, MoEType
from olmo_core.nn.moe.router import MoERouterConfig
from olmo_core.nn.rope import RoPEConfig, RoPEType
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerBlockType, TransformerConfig, TransformerType

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


_ANY: tuple[Any, ...] = ()
"""Instead of values: config.json states it, it is looked at by itself, or outputs do not depend on it."""


def _any(*names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names, _ANY)


_PUBLISHED: dict[type, dict[str, tuple[Any, ...]]] = {
    TransformerConfig: {
        "name": (TransformerType.moe, TransformerType.default),  # they differ in what they log
        **_any("d_model", "vocab_size", "n_layers", "block", "block_overrides", "lm_head", "dtype", "freeze_params"),
        **_any("init_method", "init_seed", "init_std", "embedding_init_std"),
    },
    TransformerBlockConfig: {
        "name": (TransformerBlockType.moe,),
        **_any("sequence_mixer", "layer_norm", "feed_forward_moe", "dropout"),
    },
    AttentionConfig: {
        "bias": (False,),
        **_any("n_heads", "n_kv_heads", "head_dim", "rope", "qk_norm", "pattern", "impl", "backend", "use_flash"),
        **_any("dropout", "dtype", "use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward"),
    },
    RoPEConfig: {
        # complex turns neighbouring dimensions, not those half a head apart
        "name": (RoPEType.default, RoPEType.fused),
        **_any("theta", "full_precision"),
    },
    LayerNormConfig: {
        "name": (LayerNormType.rms,),
        "bias": (False,),
        "elementwise_affine": (True, None),
        **_any("eps", "full_precision", "dtype"),
    },
    MoEConfig: {
        "name": (MoEType.dropless,),
        **_any("num_experts", "hidden_size", "router", "dtype"),
        **_any("lb_loss_weight", "lb_loss_granularity", "z_loss_weight", "scale_loss_by_num_layers"),
    },
    MoERouterConfig: _any("top_k", "jitter_eps", "dtype"),
    LMHeadConfig: {"bias": (False,), **_any("layer_norm", "dtype", "loss_implementation")},
}
"""What the parts of a config may say. A field that is not named must be off or at its default, so that an option of a newer
OLMo-core is refused until somebody has looked at it."""

_OF_A_LAYER = {"sequence_mixer.pattern", "sequence_mixer.impl", "sequence_mixer.backend", "sequence_mixer.use_flash"}
"""Keys of a block that may differ among layers; config.json has one value of every other."""


def published_block(model: TransformerConfig) -> TransformerBlockConfig:
    """The block of every layer.

    :raises ValueError: something in the model that ``OlmoeForCausalLM`` has no place for would be lost.
    """
    block = model.block
    if not isinstance(block, TransformerBlockConfig):
        raise ValueError("model.block must be one block for all layers, as in OLMoE")
    mixer = block.sequence_mixer
    if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
        raise ValueError("model.block.sequence_mixer must be attention with rope, as in OLMoE")
    if block.feed_forward_moe is None:
        raise ValueError("model.block.feed_forward_moe must be set, as in OLMoE")
    norms = {
        "model.block.layer_norm": block.layer_norm,
        "model.block.sequence_mixer.qk_norm": mixer.qk_norm,
        "model.lm_head.layer_norm": model.lm_head.layer_norm,
    }
    for key, norm in norms.items():
        if norm is None or norm.eps is None or block.layer_norm is None or norm.eps != block.layer_norm.eps:
            raise ValueError(f"{key} must be rms, with one eps for all, as in OLMoE")
    if mixer.head_dim not in (None, model.d_model // mixer.n_heads):
        raise ValueError(f"model.block.sequence_mixer.head_dim={mixer.head_dim} must be d_model / n_heads, as in OLMoE")
    for key, (value, allowed) in _values(model, "model.").items():
        if allowed and not any(value is one or (one and value == one) for one in allowed):
            wanted = "null" if allowed[0] is None else str(allowed[0]).lower()
            raise ValueError(f"{key}={value} must be {wanted}, as in OLMoE: transformers has no place for it")
    everywhere = _values(block)
    for layer, own in (model.block_overrides or {}).items():
        its = _values(own)
        for key in {**everywhere, **its}:
            value, other = (values.get(key, (None, _ANY))[0] for values in (its, everywhere))
            if key not in _OF_A_LAYER and value != other:
                raise ValueError(
                    f"model.block_overrides.{layer}.{key}={value} but model.block has {other}: transformers has one for all "
                    "layers"
                )
    return block


def _values(config: Any, at: str = "") -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every value in a config and its parts by dotted key, and what it may be; any value where that is empty."""
    known = next(_PUBLISHED[cls] for cls in type(config).__mro__ if cls in _PUBLISHED)
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in known and isinstance(value, tuple(_PUBLISHED)):
            found |= _values(value, f"{at}{f.name}.")
        else:
            found[f"{at}{f.name}"] = value, known.get(f.name, (f.default, None, False))
    return found
