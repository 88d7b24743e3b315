"""A mask that is lost on the way is found: in native, exported, cached, Ulysses and hybrid models."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from benchmarks.tiny import HEADS, VOCAB, on_ranks, tiny
from spattn_olmoe import build_pattern
from spattn_olmoe.model import apply_remedies, with_attention
from spattn_olmoe.patterns import VARIANTS
from spattn_olmoe.serving import modeling_spattn_olmoe as modeling

from .hf.conftest import exported  # noqa: F401 - a fixture
from .mask_probe import only_head, probes, wrong_pairs
from .ulysses_mask_worker import SCRIPT

N, T = 48, 40
SECTIONS = {
    "exclusive": VARIANTS["exclusive"].section,
    "sharing, hybrid": VARIANTS["sharing"].section | {"layers": [1]},
}
each_section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())


def ids():
    return torch.randint(2, VOCAB, (1, T), generator=torch.Generator().manual_seed(7))


def probe(model, weights, patterns, logits_of):
    """What is wrong with a model, head by head; ``weights`` are its output projections."""
    originals = [weight.detach().clone() for weight in weights]
    wrong = []
    for layer, head in probes(patterns):
        for weight, kept in zip(weights, only_head(originals, layer, head, HEADS), strict=True):
            weight.data.copy_(kept)
        wrong += wrong_pairs(logits_of, ids(), patterns[layer], head)
    for weight, original in zip(weights, originals, strict=True):
        weight.data.copy_(original)
    return wrong


def native_parts(pair):
    blocks = [pair.native.blocks[str(i)].attention for i in range(len(pair.checkpoint.layers))]
    return [block.w_out.weight for block in blocks], [build_pattern(**layer) for layer in pair.checkpoint.layers]


@each_section
def test_native(exported, section):  # noqa: F811
    pair = exported(section)
    weights, patterns = native_parts(pair)
    assert probe(pair.native, weights, patterns, pair.native) == []


@each_section
def test_native_with_a_cache(exported, section):  # noqa: F811
    pair = exported(section)
    weights, patterns = native_parts(pair)
    blocks = [block.attention for block in pair.native.blocks.values()]

    def stepwise(tokens):
        for block in blocks:
            block.init_kv_cache_manager(1, T)
        parts = [tokens[:, :25], *tokens[:, 25:].split(1, dim=1)]
        return torch.cat([pair.native(part) for part in parts], dim=1)

    try:
        assert probe(pair.native, weights, patterns, stepwise) == []
    finally:
        for block in blocks:
            block.kv_cache_manager = None


@each_section
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_exported(exported, section, cached, monkeypatch):  # noqa: F811
    pair = exported(section)
    monkeypatch.setattr(modeling, "_package_attention", lambda *_: None)
    model = modeling.SPAttnOlmoeForCausalLM.from_pretrained(pair.folder).eval()
    weights = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    _, patterns = native_parts(pair)

    def logits_of(tokens):
        if not cached:
            return model(tokens).logits
        cache = DynamicCache(config=model.config)
        parts = [tokens[:, :25], *tokens[:, 25:].split(1, dim=1)]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)

    assert probe(model, weights, patterns, logits_of) == []


def test_ulysses(tmp_path):
    on_ranks(2, SCRIPT, str(tmp_path / "wrong.json"))
    found = json.loads((tmp_path / "wrong.json").read_text())
    assert found["correct"] == []
    assert found["heads forgotten"] != []


def test_the_probe_finds_dense_attention_and_a_shifted_band(exported):  # noqa: F811
    pair = exported(SECTIONS["exclusive"])
    weights, patterns = native_parts(pair)
    dense = build_pattern("standard", n_heads=HEADS, band_length=N)
    assert any(", key 0: does not move" in line for line in probe(pair.native, weights, [dense] * 2, pair.native))
    apply_remedies()
    model = with_attention(tiny("model.d_model=64").model, band_length=N, type="standard").build().eval()
    model.load_state_dict(pair.native.state_dict())
    outputs = [block.attention.w_out.weight for block in model.blocks.values()]
    assert any(": moves" in line for line in probe(model, outputs, patterns, model))
