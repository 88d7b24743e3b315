"""Our model against transformers' OlmoeForCausalLM: the same weights, the same logits."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.tiny import EOS, PAD, VOCAB, tiny
from spattn_olmoe.model import apply_remedies, hf, with_attention

transformers = pytest.importorskip("transformers")

N, LENGTH = 48, 40
SECTIONS = {
    "standard": {"type": "standard"},
    "exclusive bands": {"type": "spattention"},
    "shared bands": {"type": "spattention", "local_sharing": True},
    "reordered bands": {"type": "spattention", "head_order": "balanced"},
    "layers differ": {"type": "spattention", "local_sharing": True, "layers": [1]},
    "sliding window": {"type": "sliding_window"},
    "reformer": {"type": "reformer"},
    "longformer": {"type": "longformer"},
    "bands of the input": {"type": "eball", "follows_input": True},
}
FIXED = {name: section for name, section in SECTIONS.items() if "follows_input" not in section}
each_section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
each_fixed_section = pytest.mark.parametrize("section", FIXED.values(), ids=FIXED.keys())


@pytest.fixture(autouse=True, scope="module")
def attending_under_patterns():
    apply_remedies()
    hf.register_with_transformers()


def pair(section, **mixer):
    """Transformers' model with random weights, ours with the same, and our config."""
    base = tiny("model.d_model=64").model
    for key, value in mixer.items():
        setattr(base.block.sequence_mixer, key, value)
    config = with_attention(base, band_length=N, **section)
    theirs_config = hf.transformers_config(config, max_length=64, eos_token_id=EOS, pad_token_id=PAD)
    theirs = transformers.OlmoeForCausalLM(theirs_config).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # transformers' own initialisation is so small that attention would hardly matter
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
    ours = config.build().eval()
    ours.load_state_dict(hf.from_transformers(theirs.state_dict(), config.n_layers))
    return theirs, ours, config


def tokens(B=2, T=LENGTH):
    return torch.randint(2, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))


def under_patterns(theirs):
    theirs.config._attn_implementation = hf.IMPLEMENTATION
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("mixer", [{}, {"n_kv_heads": 2}], ids=["all heads", "shared key heads"])
def test_dense_logits_are_those_of_transformers_own_attention(mixer):
    theirs, ours, _ = pair({"type": "standard"}, **mixer)
    assert theirs.config._attn_implementation != hf.IMPLEMENTATION
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dense_logits_with_random_weights_as_transformers_draws_them():
    config = with_attention(tiny().model, band_length=N)
    torch.manual_seed(3)
    theirs = transformers.OlmoeForCausalLM(
        hf.transformers_config(config, max_length=64, eos_token_id=EOS, pad_token_id=PAD)
    ).eval()
    ours = config.build().eval()
    ours.load_state_dict(hf.from_transformers(theirs.state_dict(), config.n_layers))
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@each_section
@pytest.mark.parametrize("mixer", [{}, {"n_kv_heads": 2}], ids=["all heads", "shared key heads"])
def test_logits_are_those_of_transformers_under_the_same_mask(section, mixer):
    theirs, ours, _ = pair(section, **mixer)
    expected = ours(tokens())
    if section["type"] != "standard":
        assert (theirs(tokens()).logits - expected).abs().max() > 0.1  # its own attention is dense
    torch.testing.assert_close(under_patterns(theirs)(tokens()).logits, expected, atol=1e-5, rtol=1e-5)


def padded_on_the_left(T=LENGTH):
    ids, mask = tokens(T=T), torch.ones(2, T, dtype=torch.long)
    ids[1, :7], mask[1, :7] = PAD, 0
    return ids, mask


@torch.no_grad()
@each_fixed_section
def test_left_padding_is_as_if_it_were_not_there(section):
    theirs, ours, _ = pair(section)
    ids, mask = padded_on_the_left()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = under_patterns(theirs)(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[1, 7:], ours(ids[1:, 7:])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0], ours(ids[:1])[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_right_padding_is_refused():
    theirs, _, _ = pair({"type": "spattention"})
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        under_patterns(theirs)(tokens(), attention_mask=mask)


@each_fixed_section
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_generation_with_a_cache_is_generation_without(section, padded):
    theirs, _, _ = pair(section)
    ids, mask = padded_on_the_left(T=20) if padded else (tokens(T=20), torch.ones(2, 20, dtype=torch.long))
    asked = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    cached = under_patterns(theirs).generate(ids, use_cache=True, **asked)
    whole = theirs.generate(ids, use_cache=False, **asked)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-5, rtol=1e-5)


def test_bands_of_the_input_refuse_a_cache():
    theirs, _, _ = pair({"type": "eball", "follows_input": True})
    with pytest.raises(ValueError, match="use_cache=False"):
        under_patterns(theirs).generate(tokens(T=20), max_new_tokens=3, do_sample=False, use_cache=True)


def test_weights_go_to_transformers_and_back_unchanged():
    theirs, ours, config = pair({"type": "spattention"})
    there = hf.to_transformers(ours.state_dict(), config)
    assert there.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(there[name], tensor), name
    back = hf.from_transformers(there, config.n_layers)
    assert back.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back[name], tensor), name


@torch.no_grad()
def test_a_saved_transformers_model_carries_its_patterns(tmp_path):
    theirs, ours, _ = pair({"type": "spattention", "layers": [1]})
    theirs.save_pretrained(tmp_path)
    again = transformers.OlmoeForCausalLM.from_pretrained(tmp_path, attn_implementation=hf.IMPLEMENTATION).eval()
    torch.testing.assert_close(again(tokens()).logits, ours(tokens()), atol=1e-5, rtol=1e-5)


ELSEWHERE = {
    "block.name=moe_reordered_norm": "model.block.name must be 'moe'",
    "block.feed_forward_moe.router.normalize_expert_weights=1.0": "normalize_expert_weights must be null",
    "block.feed_forward_moe.router.gating_function=sigmoid": "gating_function must be softmax",
    "block.feed_forward_moe.router.bias_gamma=0.001": "bias_gamma must be null",
    "block.feed_forward_moe.shared_mlp={hidden_size: 16}": "shared_mlp must be null",
    "block.sequence_mixer.bias=true": "sequence_mixer.bias must be false",
    "block.sequence_mixer.clip_qkv=8.0": "clip_qkv must be null",
    "block.sequence_mixer.head_dim=32": "head_dim must be",
    "block.sequence_mixer.use_head_qk_norm=true": "use_head_qk_norm must be false",
    "block.sequence_mixer.gate={}": "gate must be null",
    "block.sequence_mixer.qk_norm=null": "qk_norm must be rms",
    "block.sequence_mixer.qk_norm.eps=1e-6": "qk_norm must be rms",
    "block.sequence_mixer.rope=null": "attention with rope",
    "block.sequence_mixer.rope.partial_rotary_factor=0.5": "partial_rotary_factor must be 1",
    "block.layer_norm.bias=true": "model.block.layer_norm must be rms",
    "lm_head.layer_norm.eps=1e-6": "model.lm_head.layer_norm must be rms",
    "lm_head.bias=true": "model.lm_head.bias must be false",
    "tie_word_embeddings=true": "tie_word_embeddings must be false",
    "embed_scale=2.0": "embed_scale must be null",
}


@pytest.mark.parametrize(("override", "said"), ELSEWHERE.items(), ids=ELSEWHERE.keys())
def test_what_transformers_has_no_place_for_is_refused(override, said):
    config = with_attention(tiny(f"model.{override}").model, band_length=N)
    with pytest.raises(ValueError, match=said):
        hf.transformers_config(config, max_length=64, eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.parametrize("change", ["heads", "experts"])
def test_a_layer_of_another_shape_is_refused(change):
    base = tiny().model
    own = copy.deepcopy(base.block)
    if change == "heads":
        own.sequence_mixer.n_heads = 8
    else:
        own.feed_forward_moe.hidden_size = 64
    base.block_overrides = {1: own}
    with pytest.raises(ValueError, match=r"model\.block_overrides"):
        hf.to_transformers({}, with_attention(base, band_length=N))
