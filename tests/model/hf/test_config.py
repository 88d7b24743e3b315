"""Which models have a place in transformers, and which config of transformers describes the same model."""

from __future__ import annotations

import copy
import functools

import pytest
from transformers import OlmoeConfig

from benchmarks.tiny import EOS, PAD, tiny
from spattn_olmoe.model import with_attention
from spattn_olmoe.model.hf.config import hf_config, require_same_model

N = 48


def config_of(model):
    return hf_config(model, max_length=64, eos_token_id=EOS, pad_token_id=PAD, dtype="float32")


ELSEWHERE = {
    "name=normalized": "model.name=normalized must be moe",
    "block.name=moe_reordered_norm": "model.block.name=moe_reordered_norm must be moe",
    "block.attention_residual_alpha=0.5": "attention_residual_alpha=0.5 must be null",
    "block.feed_forward_moe.name=default": "feed_forward_moe.name=default must be dropless",
    "block.feed_forward_moe.capacity_factor=1.2": "capacity_factor=1.2 must be null",
    "block.feed_forward_moe.router.normalize_expert_weights=1.0": "normalize_expert_weights=1.0 must be null",
    "block.feed_forward_moe.router.gating_function=sigmoid": "gating_function=sigmoid must be softmax",
    "block.feed_forward_moe.router.bias_gamma=0.001": "bias_gamma=0.001 must be null",
    "block.feed_forward_moe.router.uniform_expert_assignment=true": "uniform_expert_assignment=True must be false",
    "block.feed_forward_moe.router.random_expert_assignment=true": "random_expert_assignment=True must be false",
    "block.feed_forward_moe.shared_mlp={hidden_size: 16}": r"shared_mlp=.* must be null",
    "block.sequence_mixer.bias=true": "sequence_mixer.bias=True must be false",
    "block.sequence_mixer.clip_qkv=8.0": "clip_qkv=8.0 must be null",
    "block.sequence_mixer.head_dim=32": "head_dim=32 must be d_model / n_heads",
    "block.sequence_mixer.use_head_qk_norm=true": "use_head_qk_norm=True must be null",
    "block.sequence_mixer.gate={}": "gate=.* must be null",
    "block.sequence_mixer.qk_norm=null": "qk_norm must be rms",
    "block.sequence_mixer.qk_norm.eps=1e-6": "qk_norm must be rms, with one eps",
    "block.sequence_mixer.qk_norm.name=default": "qk_norm.name=default must be rms",
    "block.sequence_mixer.rope=null": "attention with rope",
    "block.sequence_mixer.rope.name=complex": "rope.name=complex must be default",
    "block.sequence_mixer.rope.partial_rotary_factor=0.5": "partial_rotary_factor=0.5 must be 1",
    "block.sequence_mixer.rope.scaling={_CLASS_: olmo_core.nn.rope.PIRoPEScalingConfig}": r"rope.scaling=.* must be null",
    "block.layer_norm.bias=true": "model.block.layer_norm.bias=True must be false",
    "block.layer_norm.elementwise_affine=false": "elementwise_affine=False must be true",
    "lm_head.layer_norm.eps=1e-6": "model.lm_head.layer_norm must be rms, with one eps",
    "lm_head.bias=true": "model.lm_head.bias=True must be false",
    "lm_head.name=normalized": "model.lm_head.name=normalized must be default",
    "tie_word_embeddings=true": "tie_word_embeddings=True must be false",
    "embed_scale=2.0": "embed_scale=2.0 must be null",
    "embedding_norm={name: rms, eps: 1e-5, bias: false}": r"embedding_norm=.* must be null",
}


@pytest.mark.parametrize(("override", "said"), ELSEWHERE.items(), ids=ELSEWHERE.keys())
def test_what_transformers_has_no_place_for_is_refused(override, said):
    config = with_attention(tiny(f"model.{override}").model, band_length=N)
    with pytest.raises(ValueError, match=said):
        config_of(config)


LAYERS_OWN = {
    "sequence_mixer.n_heads": 8,
    "sequence_mixer.rope.theta": 500_000,
    "sequence_mixer.rope.name": "fused",
    "sequence_mixer.qk_norm.eps": 1e-6,
    "feed_forward_moe.hidden_size": 64,
    "feed_forward_moe.router.top_k": 1,
    "layer_norm.eps": 1e-6,
}


@pytest.mark.parametrize(("key", "value"), LAYERS_OWN.items(), ids=LAYERS_OWN.keys())
def test_a_layer_that_differs_in_more_than_its_attention_type_is_refused(key, value):
    base = tiny().model
    own = copy.deepcopy(base.block)
    *parts, name = key.split(".")
    setattr(functools.reduce(getattr, parts, own), name, value)
    base.block_overrides = {1: own}
    with pytest.raises(ValueError, match=rf"model\.block_overrides\.1\.{key}={value} but model\.block has"):
        config_of(with_attention(base, band_length=N))


def test_fused_rope_is_the_same_model():
    fused = tiny("model.block.sequence_mixer.rope.name=fused").model
    assert config_of(with_attention(fused, band_length=N)) == config_of(with_attention(tiny().model, band_length=N))


NO_RULE = {
    "follows_input=true": {"type": "eball", "follows_input": True},
    "buckets=lsh": {"type": "reformer", "buckets": "lsh"},
    "random_links=seeded": {"type": "bigbird", "random_links": "seeded"},
}


@pytest.mark.parametrize(("said", "section"), NO_RULE.items(), ids=NO_RULE.keys())
def test_a_mask_that_no_rule_describes_is_refused(said, section):
    with pytest.raises(ValueError, match=said):
        config_of(with_attention(tiny().model, band_length=N, **section))


# ---- the same model? -------------------------------------------------------------------------------------------------


def published(**changes):
    """A config as the published OLMoE has it: no eps, ``torch_dtype``, rope as a number."""
    wanted = config_of(with_attention(tiny().model, band_length=N))
    left_out = ("rms_norm_eps", "rope_parameters", "dtype", "bos_token_id", "attention_bias", "attention_dropout")
    return wanted, {key: value for key, value in wanted.items() if key not in left_out} | {
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
        "transformers_version": "4.43.0.dev0",
        **changes,
    }


def test_the_published_form_is_the_same_model():
    wanted, found = published()
    require_same_model(found, wanted, "config.json", "tiny.yaml")
    by_transformers = OlmoeConfig.from_dict(found).to_dict() | {"architectures": ["OlmoeForCausalLM"]}
    require_same_model(by_transformers, wanted, "config.json", "tiny.yaml")


OTHER = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "vocab_size": 128,
    "norm_topk_prob": True,
    "clip_qkv": 8.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0},
    "hidden_act": "gelu",
    "attention_bias": True,
    "attention_dropout": 0.1,
    "eos_token_id": 7,
    "pad_token_id": 7,
    "bos_token_id": 7,
    "max_position_embeddings": 32,
    "shared_expert_intermediate_size": 64,
    "quantization_config": {"bits": 4},
}


@pytest.mark.parametrize(("key", "value"), OTHER.items(), ids=OTHER.keys())
def test_another_model_is_refused_by_the_key(key, value):
    wanted, found = published(**{key: value})
    with pytest.raises(ValueError, match="rope_type" if key == "rope_parameters" else key):
        require_same_model(found, wanted, "config.json", "tiny.yaml")
