"""The sequence mixer against OLMo-core's dense attention, and against a masked computation written here."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys

import pytest
import torch
from olmo_core.nn.attention import (
    Attention,
    AttentionBackendName,
    AttentionConfig,
    AttentionType,
    GateConfig,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

from benchmarks.forked import environment
from benchmarks.tiny import tiny
from spattn_olmoe import build_pattern
from spattn_olmoe.kernels import flex, strips
from spattn_olmoe.model import PatternAttention, PatternAttentionConfig, mixer, with_attention
from spattn_olmoe.patterns import available_variants, find_variant

D_MODEL, N = 32, 48
DENSE = {"n_heads": 4, "bias": False, "rope": RoPEConfig(), "qk_norm": LayerNormConfig(bias=False)}
VARIANTS = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "bias and head norm": {"bias": True, "use_head_qk_norm": True},
    "gate, clip, wide heads": {"gate": GateConfig(), "clip_qkv": 0.5, "head_dim": 16},
}
MASKS = [mask for mask in map(find_variant, available_variants()) if not mask.build(4, N).follows_content]
PATTERNS = {mask.name: (mask.type, dict(mask.options)) for mask in MASKS}
PATTERNS["bands of the input"] = ("eball", {"follows_input": True})
each_pattern = pytest.mark.parametrize(("pattern", "options"), PATTERNS.values(), ids=PATTERNS)
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def config(pattern="standard", options=None, **dense) -> PatternAttentionConfig:
    return PatternAttentionConfig(**{**DENSE, **dense}, pattern={"name": pattern, "band_length": N, **(options or {})})


def build(cfg: AttentionConfig, seed: int = 0, **kwargs):
    """The module with weights large enough that attention is far from uniform."""
    module = cfg.build(D_MODEL, layer_idx=0, n_layers=2, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def inputs(B=2, T=N, seed=1):
    return torch.randn(B, T, D_MODEL, generator=torch.Generator().manual_seed(seed))


def dense_with_mask(variant, mask_HTT):
    """OLMo-core's dense attention, its softmax replaced by one under a mask, head by head."""
    dense = build(AttentionConfig(**{**DENSE, **variant}))

    def sdpa(q, k, v, **_):
        group = q.shape[2] // k.shape[2]
        out = torch.zeros_like(q)
        for b in range(q.shape[0]):
            for h in range(q.shape[2]):
                scores = q[b, :, h] @ k[b, :, h // group].T / q.shape[-1] ** 0.5
                alive = mask_HTT[h].any(-1)
                scores = scores[alive].masked_fill(~mask_HTT[h][alive], -torch.inf)
                out[b, alive, h] = scores.softmax(-1) @ v[b, :, h // group]
        return out

    dense.sdpa = sdpa
    return dense


# ---- configs and parameters ------------------------------------------------------------------------------------------


@each_pattern
def test_config_survives_a_dictionary_and_json(pattern, options):
    before = config(pattern, options, n_kv_heads=2, impl="reference")
    plain = json.loads(json.dumps(before.as_config_dict()))
    for after in (PatternAttentionConfig.from_dict(plain), SequenceMixerConfig.from_dict(plain)):
        assert type(after) is PatternAttentionConfig
        assert after == before
        assert after.build_pattern() == before.build_pattern()


def test_a_saved_model_config_alone_rebuilds_the_masks():
    model = with_attention(tiny().model, band_length=N, type="spattention", local_sharing=True, layers=[1])
    code = """
import json, sys
from olmo_core.nn.transformer import TransformerConfig
model = TransformerConfig.from_dict(json.loads(sys.argv[1])).build()
print("RESULT", [repr(model.blocks[str(i)].attention.pattern) for i in range(2)])
"""
    command = [sys.executable, "-c", code, json.dumps(model.as_config_dict())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    there = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    here = [repr(model.build().blocks[str(i)].attention.pattern) for i in range(2)]
    assert there == f"RESULT {here}"
    assert "Standard" in here[0]
    assert "local_sharing=True" in here[1]


@each_variant
def test_parameters_are_those_of_dense_attention(variant):
    cfg, dense_cfg = config("spattention", **variant), AttentionConfig(**{**DENSE, **variant})
    ours, dense = build(cfg), build(dense_cfg, seed=7)
    shapes = {name: p.shape for name, p in dense.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes
    assert list(ours.state_dict()) == list(dense.state_dict())
    counted = sum(p.numel() for p in ours.parameters())
    assert cfg.num_params(D_MODEL) == dense_cfg.num_params(D_MODEL) == counted
    assert isinstance(ours, PatternAttention)
    assert isinstance(ours, Attention)  # OLMo-core's rotary buffers and generation look for it
    ours.load_state_dict(dense.state_dict())
    dense.load_state_dict(ours.state_dict())


# ---- outputs ---------------------------------------------------------------------------------------------------------


@each_variant
def test_standard_is_olmo_cores_dense_attention(variant):
    dense = build(AttentionConfig(**{**DENSE, **variant}))
    ours = build(config(**variant), seed=5)
    x = inputs()
    assert not torch.allclose(ours(x), dense(x), atol=1e-3)
    ours.load_state_dict(dense.state_dict())
    torch.testing.assert_close(ours(x), dense(x), atol=2e-6, rtol=1e-5)


@each_variant
@each_pattern
def test_output_and_gradients_are_those_under_the_mask(pattern, options, variant):
    T = 40 if options.get("follows_input") else N
    ours = build(config(pattern, options, **variant))
    mask = ours.pattern.dense_mask(T)
    theirs = dense_with_mask(variant, mask)
    x = inputs(T=T)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = inputs(T=T, seed=2)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.grad is not None or its.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, atol=2e-4, rtol=1e-4, msg=name)
    if pattern != "standard":
        causal = torch.ones(4, T, T, dtype=torch.bool).tril()
        assert (dense_with_mask(variant, causal)(x) - out).abs().max() > 1e-2  # the mask matters here


@pytest.mark.parametrize("impl", ["reference", "cpu", "flex"])
def test_every_implementation_gives_the_same(impl):
    ours = build(config("spattention", {"local_sharing": True}))
    other = build(config("spattention", {"local_sharing": True}, impl=impl))
    with torch.no_grad():
        torch.testing.assert_close(other(inputs()), ours(inputs()), atol=1e-5, rtol=1e-5)


@each_pattern
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_training_goes_on_after_inference(pattern, options, documents):
    """What inference has left in a cache serves a backward pass."""
    ours = build(config(pattern, {**(options or {}), "band_length": N + 3}))
    x = inputs(B=1, T=N + 3)
    packed = {"cu_doc_lens": torch.tensor([0, 20, N + 3]), "max_doc_len": 31} if documents else {}
    ours(
        x, **packed
    )  # OLMo-core's rotary buffers: made here, or inference would leave some that cannot be trained with
    strips.stacks.cache_clear()
    strips._mask.cache_clear()
    with torch.inference_mode():
        before = ours(x, **packed)
    after = ours(x, **packed)
    after.sum().backward()
    torch.testing.assert_close(after, before.clone(), atol=1e-6, rtol=1e-6)


def test_block_masks_made_in_inference_serve_training():
    pattern = build_pattern("spattention", n_heads=4, band_length=N)
    flex._block_mask.cache_clear()
    with torch.inference_mode():
        made = flex.block_mask(pattern, 1, N, 4, 0, torch.device("cpu"))
        documents = flex.block_mask(pattern, 1, N, 4, 0, torch.device("cpu"), torch.tensor([0, 20, N]))
    assert not made.kv_num_blocks.is_inference()
    assert documents.kv_num_blocks.is_inference()  # it lives as long as the tensor of lengths, which is one too


BY_DISTANCE = ("dense", "exclusive", "sharing", "sliding_window", "eball", "gbhalf", "reformer")


@pytest.mark.parametrize(("pattern", "options"), [PATTERNS[mask] for mask in BY_DISTANCE], ids=BY_DISTANCE)
def test_documents_are_attended_as_if_each_were_alone(pattern, options):
    ours = build(config(pattern, options))
    x = inputs(B=2, T=N)
    ends = [0, 13, 20, 48, 80, 96]  # two rows of 48: no document crosses the rows
    cu_doc_lens = torch.tensor(ends, dtype=torch.int32)
    packed = ours(x, cu_doc_lens=cu_doc_lens, max_doc_len=32).flatten(0, 1)
    flat = x.flatten(0, 1)
    for start, stop in itertools.pairwise(ends):
        alone = ours(flat[None, start:stop])[0]
        torch.testing.assert_close(packed[start:stop], alone, atol=1e-5, rtol=1e-5)
    if pattern == "standard":
        assert (packed - ours(x).flatten(0, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("pattern", ["longformer", "bigbird"])
def test_documents_under_a_pattern_of_positions(pattern):
    """Their global tokens are the row's first, so a document is the mask cut to it, not the mask of its length."""
    ours = build(config(pattern))
    x, cut = inputs(B=1), 19
    same = torch.arange(N)[:, None].ge(cut) == torch.arange(N)[None, :].ge(cut)
    expected = dense_with_mask({}, ours.pattern.dense_mask(N) & same)(x)
    packed = ours(x, cu_doc_lens=torch.tensor([0, cut, N], dtype=torch.int32), max_doc_len=N - cut)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


def test_a_model_initialised_on_the_meta_device_attends_like_any_other():
    model = with_attention(tiny().model, band_length=32, type="spattention", local_sharing=False)
    late, early = model.build(init_device="meta"), model.build()
    late.to_empty(device=torch.device("cpu"))
    late.init_weights(max_seq_len=32, max_local_microbatch_size=64, device=torch.device("cpu"))
    early.load_state_dict(late.state_dict())
    with torch.no_grad():
        ours = late.blocks["0"].attention
        x = torch.randn(2, 32, 32)
        torch.testing.assert_close(ours(x), early.blocks["0"].attention(x), atol=0, rtol=0)
        dead = ours.backend((*(torch.randn(1, 32, 4, 8) for _ in range(3)),))[:, :8, 1]
    assert torch.equal(dead, torch.zeros_like(dead))  # head 1's band begins at distance 8
    assert late.num_flops_per_token(32) == early.num_flops_per_token(32)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize("T", [16, 37, N, 100])
def test_flops_are_counted_from_the_mask(pattern, options, T):
    ours = build(config(pattern, options, n_kv_heads=2))
    pairs = int(ours.pattern.dense_mask(T).sum())
    parameters = sum(p.numel() for p in ours.parameters())
    assert ours.num_flops_per_token(T) == 6 * parameters + 12 * ours.head_dim * pairs // T


@pytest.mark.parametrize("T", [16, 37, N])
def test_flops_of_standard_are_olmo_cores(T):
    dense = build(AttentionConfig(**DENSE))
    assert build(config()).num_flops_per_token(T) == dense.num_flops_per_token(T)


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "dropout": ({"dropout": 0.1}, ["dropout=0.1", "set it to 0"]),
    "sinks": ({"attention_sinks": True}, ["attention_sinks=True", "leave it unset"]),
    "scalable softmax": ({"scalable_softmax": True}, ["scalable_softmax=True", "leave it unset"]),
    "sliding window": (
        {"sliding_window": SlidingWindowAttentionConfig(pattern=[8])},
        ["sliding_window", "leave it unset"],
    ),
    "fp8 projections": ({"mxfp8_projections": True}, ["mxfp8_projections=True", "leave it unset"]),
    "fused": ({"name": AttentionType.fused_v2}, ["fused_v2", "'default'"]),
    "implementation": ({"impl": "fast"}, ["attention.impl='fast'", "auto", "cpu"]),
    "heads and width": ({"n_heads": 5}, ["d_model=32", "n_heads=5", "multiple"]),
    "key/value heads": ({"n_kv_heads": 3}, ["n_heads=4", "n_kv_heads=3", "multiple"]),
    "no global rope": (
        {"rope": RoPEConfig(no_global_rope=True)},
        ["rope.no_global_rope=true", "not supported"],
    ),
    "type": ({"pattern": {"name": "spatention"}}, ["attention.type='spatention'", "'spattention'"]),
    "option": ({"pattern": {"name": "eball", "sharing": 1}}, ["attention.sharing", "eball"]),
    "option's value": (
        {"pattern": {"follows_input": "both"}},
        ["attention.follows_input='both'", "must be true or false"],
    ),
    "no band length": ({"pattern": {"band_length": 0}}, ["attention.band_length=0", "at least 1"]),
    "more heads than tokens": ({"n_heads": 8, "pattern": {"band_length": 4}}, ["n_heads=8", "band_length=4"]),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_honoured_is_refused_in_one_line(change, said):
    pattern = {"name": "standard", "band_length": N, **change.get("pattern", {})}
    cfg = PatternAttentionConfig(**{**DENSE, **change, "pattern": pattern})
    with pytest.raises(ValueError) as caught:
        cfg.build(D_MODEL, layer_idx=0, n_layers=2)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize("stated", [{"backend": AttentionBackendName.flash_3}, {"use_flash": True}])
def test_a_backend_that_the_pattern_replaces_is_named_once(caplog, stated):
    mixer._warn_backend.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            build(config(**stated))
    said = [record.getMessage() for record in caplog.records if "is not used under an attention pattern" in record.msg]
    assert len(said) == 1
    assert ("flash_3" if "backend" in stated else "flash_2") in said[0]
    assert "attention.impl=auto" in said[0]


def test_what_the_backend_lacks_it_says():
    backend = build(config("eball")).backend
    for refuse, words in [
        (backend.assert_supports_swa, "sliding_window"),
        (backend.assert_supports_ring_cp, "Ulysses"),
        (backend.assert_supports_packed_qkv, "packed"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            refuse()
    q = torch.randn(1, 8, 4, 8)
    with pytest.raises(RuntimeError, match="packed"):
        backend(torch.randn(1, 8, 3, 4, 8))
    with pytest.raises(RuntimeError, match="sinks"):
        backend((q, q, q), sinks=torch.zeros(4))


# ---- beyond the band length ------------------------------------------------------------------------------------------


def warnings_of(caplog, pattern, T, n_seq, **options):
    caplog.clear()
    cfg = PatternAttentionConfig(**DENSE, pattern={"name": pattern, "band_length": n_seq, **options})
    module = build(cfg)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(3):
            module(inputs(T=T))
    return [record.getMessage() for record in caplog.records if "longer than the band length" in record.getMessage()]


def test_an_input_beyond_the_band_length_is_said_once(caplog):
    said = warnings_of(caplog, "spattention", T=30, n_seq=29)
    assert len(said) == 1
    assert "spattention" in said[0]
    assert "29" in said[0]


@pytest.mark.parametrize(
    ("pattern", "T", "options"),
    [("spattention", 27, {}), ("standard", 40, {}), ("spattention", 40, {"follows_input": True})],
)
def test_no_warning_where_nothing_is_lost(caplog, pattern, T, options):
    assert warnings_of(caplog, pattern, T=T, n_seq=27, **options) == []
