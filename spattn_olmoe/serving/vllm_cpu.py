"""vLLM's attention on a CPU, for layers that carry a rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from .modeling_spattn_olmoe import by_sdpa
from .vllm_plugin import pages, write_pages


class RuleBackend(CPUAttentionBackend):
    """The CPU backend. It keeps its name: vLLM looks it up."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return RuleImpl


class RuleImpl(CPUAttentionBackendImpl):
    """Attention under ``layer.attention_rule``; layers without one are vLLM's own."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if not hasattr(layer, "attention_rule"):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        n = len(slot_mapping)  # the rest is padding
        write_pages(kv_cache, key[:n], value[:n], slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if not hasattr(layer, "attention_rule") or attn_metadata is None:  # None: vLLM warms up
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        starts = attn_metadata.query_start_loc.tolist()
        for n, length in enumerate(attn_metadata.seq_lens.tolist()):
            start, stop = starts[n], starts[n + 1]
            if start == stop:
                continue
            k, v = pages(kv_cache, attn_metadata.block_table[n], length)
            place = torch.arange(length, dtype=torch.int32)
            places = torch.cat([place[length - (stop - start) :], place])
            places = torch.stack([torch.zeros_like(places), places])[None, :, None]
            q = query[start:stop].transpose(0, 1)[None]
            out = by_sdpa(q, k.to(q.dtype), v.to(q.dtype), places, layer.attention_rule, self.scale)
            output[start:stop].view(stop - start, q.shape[1], -1).copy_(out[0].transpose(0, 1))
        return output
