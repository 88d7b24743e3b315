"""The plugin itself: OLMo-core's attention module with an attention pattern in place of the causal mask.

Parameters have the names and shapes of dense attention, so weights go from one attention type to another unchanged. A
saved config rebuilds the mask by itself: it carries the type, its options and the band length.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from olmo_core.distributed.parallel.context_parallel import (
    all_to_all_single_cp2hp,
    all_to_all_single_hp2cp,
)
from olmo_core.nn.attention import Attention, AttentionBackend, AttentionConfig, AttentionType
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.attention.kv_cache import KVCacheManager
from olmo_core.nn.buffer_cache import BufferCache
from torch import Tensor
from torch.distributed import DeviceMesh

from ..kernels import IMPLEMENTATIONS, attention, cached_attention
from ..patterns import Pattern, build_pattern

log = logging.getLogger(__name__)

_SUPPORTED = (
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "bias",
    "gate",
    "rope",
    "clip_qkv",
    "qk_norm",
    "use_head_qk_norm",
    "qk_norm_per_head_gains",
    "use_recompute_qkv_prep",
    "mxfp8_save_qkv_for_backward",
    "dtype",
)
"""Options of dense attention that mean the same under a pattern. The others must stay at their defaults."""


@SequenceMixerConfig.register("pattern_attention")
@dataclass
class PatternAttentionConfig(AttentionConfig):
    """OLMo-core's attention config, with a pattern.

    :param pattern: arguments of :func:`spattn_olmoe.build_pattern` but for ``n_heads``, which this config has: ``name``,
        ``band_length`` and options. :class:`.Fingerprint` has the same keys.
    :param impl: how attention is computed, as in :func:`spattn_olmoe.attention`.
    """

    pattern: dict[str, Any] = field(default_factory=dict)
    impl: str = "auto"

    def build_pattern(self) -> Pattern:
        """The pattern of this config.

        :raises ValueError: unknown type or option, or a band length that does not fit.
        """
        return build_pattern(**{"name": "standard", "band_length": 0, **self.pattern, "n_heads": self.n_heads})

    def validate(self) -> None:
        """Raise a ValueError where an option cannot be honoured."""
        if self.dropout:
            raise ValueError(
                f"attention dropout={self.dropout} is not supported: no kernel of spattn_olmoe drops weights; set it to 0"
            )
        if self.impl != "auto" and self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"attention.impl={self.impl!r} is unknown (known: auto, {', '.join(IMPLEMENTATIONS)})")
        if self.name != AttentionType.default:
            raise ValueError(f"attention name={str(self.name)!r} has no patterns: use 'default'")
        if self.rope is not None and self.rope.no_global_rope:
            raise ValueError("rope.no_global_rope=true is not supported with an attention pattern")
        for f in fields(AttentionConfig):
            harmless = (*_SUPPORTED, "name", "dropout", "backend", "use_flash")
            if f.name not in harmless and getattr(self, f.name) not in (None, False, f.default):
                raise ValueError(
                    f"attention {f.name}={getattr(self, f.name)!r} is not supported with an attention pattern: leave it unset"
                )
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> PatternAttention:
        """Build the attention module of one layer."""
        self.validate()
        if self.backend is not None or self.use_flash:
            _warn_backend(str(self.backend) if self.backend is not None else "flash_2", self.impl)
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(f"d_model={d_model} must be a multiple of n_heads={self.n_heads}")
        dense = {name: getattr(self, name) for name in _SUPPORTED if getattr(self, name) is not None}
        dense["dtype"] = self.dtype.as_pt()
        return PatternAttention(
            d_model=d_model, init_device=init_device, cache=cache, pattern=self.build_pattern(), impl=self.impl, **dense
        )


def stored(pattern: Pattern) -> dict[str, Any]:
    """A pattern as :class:`PatternAttentionConfig` holds it."""
    return {key: value for key, value in pattern.to_config().items() if key != "n_heads"}


class PatternAttention(Attention):
    """Multi-head attention whose heads attend what a pattern allows.

    Takes the arguments of :class:`olmo_core.nn.attention.Attention`, and:

    :param pattern: over all heads of the model; under tensor or context parallelism each rank computes its own.
    :param impl: see :func:`spattn_olmoe.attention`.
    """

    def __init__(self, *, pattern: Pattern, impl: str = "auto", **kwargs: Any):
        super().__init__(**kwargs)
        self.pattern = pattern
        self.backend: PatternBackend = PatternBackend(
            pattern=pattern,
            impl=impl,
            head_dim=self.head_dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
        )

    def apply_tp(self, tp_mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        """Shard heads over ranks; each keeps the bands of its global heads."""
        degree = tp_mesh.size()
        if self.n_heads % degree or self.n_kv_heads % degree:
            raise ValueError(
                f"tensor parallel degree {degree} must divide n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads}"
            )
        super().apply_tp(tp_mesh, *args, **kwargs)
        self.backend.head_offset = tp_mesh.get_local_rank() * (self.n_heads // degree)

    def apply_cp(self, cp_mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        """Ulysses context parallelism: ranks exchange sequence for heads around the attention."""
        degree = cp_mesh.size()
        if self.n_heads % degree or self.n_kv_heads % degree:
            raise ValueError(
                f"context parallel degree {degree} must divide n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads}"
            )
        super().apply_cp(cp_mesh, *args, **kwargs)

    def num_flops_per_token(self, seq_len: int) -> int:
        """Forward and backward FLOPs per token: 6 a parameter, and 12 a head dimension for each attended pair."""
        projections = 6 * sum(p.numel() for p in self.parameters())
        return projections + 12 * self.head_dim * self.pattern.attended_pairs(seq_len) // seq_len

    def init_kv_cache_manager(self, batch_size: int, max_seq_len: int) -> None:
        """A KV cache in the dtype of the weights, so that cached and uncached outputs agree."""
        self.backend.assert_supports_kv_cache()
        warn_beyond_band_length(self.pattern, max_seq_len)
        self.kv_cache_manager = KVCacheManager(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            num_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            device=self.w_k.weight.device,
            dtype=self.w_k.weight.dtype,
        )


class PatternBackend(AttentionBackend):
    """Computes attention through :func:`spattn_olmoe.attention`, for the heads that this rank holds."""

    def __init__(self, *, pattern: Pattern, impl: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.pattern = pattern
        self.impl = impl
        self.head_offset = 0
        """Global index of this rank's first head under tensor parallelism."""

    def extra_repr(self) -> str:
        return f"{self.pattern}, impl={self.impl!r}"

    @classmethod
    def assert_supported(cls) -> None:
        pass

    @classmethod
    def assert_supports_swa(cls) -> None:
        raise RuntimeError(f"'{cls.__name__}' takes its mask from a pattern: use attention.type='sliding_window'")

    @classmethod
    def assert_supports_ring_cp(cls) -> None:
        raise RuntimeError(
            f"'{cls.__name__}' doesn't support ring context parallelism: its merged partial softmax knows only the causal "
            "mask. Use Ulysses (train_module.cp_config.uly)"
        )

    @classmethod
    def assert_supports_ulysses_cp(cls) -> None:
        pass

    @classmethod
    def assert_supports_packed_qkv(cls) -> None:
        raise RuntimeError(f"'{cls.__name__}' doesn't support packed QKV")

    @classmethod
    def assert_supports_kv_cache(cls) -> None:
        pass

    def forward(
        self,
        qkv: Tensor | tuple[Tensor, Tensor, Tensor],
        cu_doc_lens: Tensor | None = None,
        cu_doc_lens_q: Tensor | None = None,
        cu_doc_lens_k: Tensor | None = None,
        max_doc_len: int | None = None,
        max_doc_len_q: int | None = None,
        max_doc_len_k: int | None = None,
        local_k_slice: slice | None = None,
        kv_cache_manager: KVCacheManager | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of q ``(B, T, H, D)`` with k and v ``(B, T, G, D)``, heads as this rank holds them."""
        if isinstance(qkv, Tensor):
            self.assert_supports_packed_qkv()
        q, k, v = qkv
        if cu_doc_lens_q is not None or cu_doc_lens_k is not None or local_k_slice is not None or sinks is not None:
            raise RuntimeError(f"'{type(self).__name__}' supports neither ring attention's document slices nor sinks")

        if kv_cache_manager is not None:
            return self._cached(q, k, v, kv_cache_manager)

        offset = self.head_offset
        if self.cp_enabled:
            assert self.cp_pg is not None
            q = all_to_all_single_cp2hp(q, self.cp_pg)
            # As one tensor: the exchange of several fails on gloo in any group but that of all ranks.
            k, v = all_to_all_single_cp2hp(torch.cat([k, v], dim=-1), self.cp_pg).chunk(2, dim=-1)
            offset += torch.distributed.get_rank(self.cp_pg) * q.shape[2]
        warn_beyond_band_length(self.pattern, q.shape[1])
        out = attention(
            q, k, v, self.pattern, impl=self.impl, cu_doc_lens=cu_doc_lens, scale=self.scale, head_offset=offset
        )
        if self.cp_enabled:
            assert self.cp_pg is not None
            out = all_to_all_single_hp2cp(out.contiguous(), self.cp_pg)
        return out.contiguous()

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCacheManager) -> Tensor:
        """Append k and v to the cache and attend to all it holds. The length is never read on the host on a GPU."""
        if self.cp_enabled:
            raise RuntimeError(f"'{type(self).__name__}' doesn't support KV caching with context parallelism")
        start, T = cache.cache_seqlens, q.shape[1]
        places = (start + torch.arange(T, device=q.device)).long()
        cache.k_cache.index_copy_(1, places, k.to(cache.k_cache.dtype))
        cache.v_cache.index_copy_(1, places, v.to(cache.v_cache.dtype))
        k_all, v_all = cache.k_cache, cache.v_cache
        if q.device.type == "cpu":  # reading the length costs nothing here, and spares the empty part of the cache
            k_all, v_all = (x[:, : int(start) + T] for x in (k_all, v_all))
        return cached_attention(
            q,
            k_all,
            v_all,
            self.pattern,
            start=start,
            leftpad=cache.cache_leftpad,
            scale=self.scale,
            head_offset=self.head_offset,
        ).contiguous()


@functools.cache
def _warn_backend(backend: str, impl: str) -> None:
    log.warning("attention backend=%s is not used under an attention pattern: attention.impl=%s decides", backend, impl)


def warn_beyond_band_length(pattern: Pattern, T: int) -> None:
    """Warn once where an input is so long that some of its distances are attended by no head."""
    if T > pattern.band_length and not pattern.follows_input:
        _warn_beyond_band_length(pattern)


@functools.cache
def _warn_beyond_band_length(pattern: Pattern) -> None:
    table = pattern.table
    if table is not None and max(hi for head in table for _, hi in head) <= pattern.band_length + 1:
        log.warning(
            "%s: this input is longer than the band length %d, and no head attends distances from there on",
            pattern.name,
            pattern.band_length,
        )
