"""Attention through PyTorch's FlexAttention (arXiv 2412.05496), compiled on CUDA: any pattern, forward and backward.

The block mask is computed from the pattern's distance intervals, once per shape, and shared by all layers; of a pattern
that follows the content anew for every call, from what the pattern knows of its blocks. On a CPU
FlexAttention has no backward pass and runs uncompiled here: for checking results, not for speed.

Every mask, batch size, number of heads and length is compiled by itself, with and without gradients. So that a workload
whose lengths vary needs few of them, inputs are padded to one of few lengths (:func:`padded_length`), and too many are an
error (:data:`GRAPHS`): uncompiled on a GPU, FlexAttention holds all T x T scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from ..patterns import Pattern
from ..patterns.base import MaskMod
from .call import Call
from .documents import document_starts

BLOCK = 128
"""Side of the square blocks that a block mask keeps or skips; FlexAttention's default."""

GRAPHS = 256
"""How often FlexAttention is compiled in one process, at most. PyTorch's own limit is 8, which two masks can reach."""


@functools.cache
def compiled(backend: str = "inductor") -> Callable[..., Tensor]:
    """FlexAttention as it runs on a GPU: compiled as a whole, or not at all."""

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, enable_gqa: bool) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)

    # A function of our own, so that nobody else's graphs count. Without fullgraph it would run uncompiled at the limit.
    whole = torch.compile(attend, dynamic=False, fullgraph=True, backend=backend)

    def call(*args: Any, **options: Any) -> Tensor:
        try:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                return whole(*args, **options)
        except FailOnRecompileLimitHit as error:
            raise ValueError(
                f"attention.impl='flex' has been compiled {GRAPHS} times in this process, once for every mask, batch size, "
                "number of heads and length: use fewer of them, or impl='triton' where the mask is of distance intervals"
            ) from error

    return call


def padded_length(T: int) -> int:
    """The length that an input of ``T`` tokens is computed at: whole blocks, and at most 8 lengths from one power of two
    to the next. Lengths of at most 1024 are multiples of :data:`BLOCK`, longer ones grow by less than an eighth."""
    step = max(BLOCK, 1 << T.bit_length() >> 4)
    return -(-T // step) * step


@torch.compiler.disable  # FlexAttention is compiled by itself, once; block masks are made outside of any graph
def run(call: Call) -> Tensor:
    """Attention under a block mask.

    :raises ValueError: gradients are asked for on a CPU.
    """
    on_cpu = call.q_BTHD.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
        raise ValueError("attention.impl='flex' has no backward pass on a CPU: use impl='cpu' or 'reference'")
    T = call.q_BTHD.shape[1]
    # What is padded comes last, where no token attends it. Batches of documents are filled and all of one length.
    padding = 0 if call.cu_doc_lens is not None else padded_length(T) - T
    q_BTHD, k_BTGD, v_BTGD = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in call[:3])
    mask = mask_of_call(call.pattern, q_BTHD, k_BTGD, call.head_offset, call.cu_doc_lens)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    if on_cpu:  # it refuses inputs that require gradients even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    attend: Any = flex_attention if on_cpu else compiled()
    out = attend(q, k, v, block_mask=mask, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)[:, :T]


def mask_of_call(
    pattern: Pattern, q_BTHD: Tensor, k_BTGD: Tensor, head_offset: int = 0, cu_doc_lens: Tensor | None = None
) -> BlockMask:
    """The block mask of a call, kept where it can serve another one."""
    B, T, H, _ = q_BTHD.shape
    if pattern.follows_content:
        return _content_mask(pattern, q_BTHD, k_BTGD, head_offset, cu_doc_lens)
    return block_mask(pattern, B, T, H, head_offset, q_BTHD.device, cu_doc_lens)


def block_mask(
    pattern: Pattern, B: int, T: int, H: int, head_offset: int, device: torch.device, cu_doc_lens: Tensor | None = None
) -> BlockMask:
    """The block mask of ``H`` local heads from ``head_offset`` on; made once per shape (and per ``cu_doc_lens``)."""
    if cu_doc_lens is None:
        return _block_mask(pattern, T, H, head_offset, device)
    per_batch = _document_masks.setdefault(cu_doc_lens, {})
    version = 0 if cu_doc_lens.is_inference() else cu_doc_lens._version  # an inference tensor has none
    key = (pattern, B, T, H, head_offset, version)
    if key not in per_batch:
        per_batch[key] = _build(pattern, B, T, H, head_offset, device, document_starts(cu_doc_lens, B, T))
    return per_batch[key]


_document_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Block masks by the tensor of document lengths they were made for: all layers of a step share one."""


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # made while generating, kept, and then wanted by a backward pass
def _block_mask(pattern: Pattern, T: int, H: int, head_offset: int, device: torch.device) -> BlockMask:
    return _build(pattern, 1, T, H, head_offset, device, None)


def _content_mask(
    pattern: Pattern, q_BTHD: Tensor, k_BTGD: Tensor, head_offset: int, cu_doc_lens: Tensor | None
) -> BlockMask:
    """The block mask of a pattern that follows the content, for these queries and keys."""
    B, T, H, _ = q_BTHD.shape
    doc_start = None if cu_doc_lens is None else document_starts(cu_doc_lens, B, T)
    bound = pattern.bind(q_BTHD, k_BTGD, head_offset=head_offset, first=0 if doc_start is None else doc_start)
    mask_mod = _within_documents(bound.mask_mod, doc_start)
    if bound.blocks is None:
        return create_block_mask(mask_mod, B, H, T, T, device=q_BTHD.device, BLOCK_SIZE=BLOCK)
    some = bound.blocks(BLOCK)
    return _from_blocks(some, torch.zeros_like(some), mask_mod, T, doc_start)


def _within_documents(mask_mod: MaskMod, doc_start: Tensor | None) -> MaskMod:
    """A mask, and no pairs across documents."""
    if doc_start is None:
        return mask_mod
    return lambda b, h, q_idx, kv_idx: mask_mod(b, h, q_idx, kv_idx) & (kv_idx >= doc_start[b, q_idx])


def _build(
    pattern: Pattern, B: int, T: int, H: int, head_offset: int, device: torch.device, doc_start: Tensor | None
) -> BlockMask:
    def of_global_heads(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return pattern.mask_mod(b, h + head_offset, q_idx, kv_idx)

    mask_mod = _within_documents(of_global_heads, doc_start)
    table = pattern.table
    if table is None:
        return create_block_mask(mask_mod, None if doc_start is None else B, H, T, T, device=device, BLOCK_SIZE=BLOCK)

    some, every = _interval_blocks(table[head_offset : head_offset + H], T, device)
    return _from_blocks(some, every, mask_mod, T, doc_start)


def _from_blocks(some: Tensor, every: Tensor, mask_mod: MaskMod, T: int, doc_start: Tensor | None) -> BlockMask:
    """A block mask from the blocks that may hold a pair and those that hold every pair, documents aside."""
    if doc_start is not None:
        n = some.shape[-1]
        key_first = torch.arange(n, device=some.device) * BLOCK
        row_first = torch.arange(n, device=some.device) * BLOCK
        row_last = torch.clamp(row_first + BLOCK, max=T) - 1
        # Documents start later the later the row, so a block's first and last rows bound them.
        some = some & (key_first + BLOCK > doc_start[:, row_first, None])[:, None]
        every = every & (key_first >= doc_start[:, row_last, None])[:, None]
    partial_num, partial_idx = _ordered(some & ~every)
    full_num, full_idx = _ordered(every)
    return BlockMask.from_kv_blocks(
        partial_num, partial_idx, full_num, full_idx, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(T, T)
    )


def _interval_blocks(heads: tuple, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks hold some allowed pair, and which hold only allowed pairs: bool ``(1, H, n, n)`` each."""
    n = -(-T // BLOCK)
    first = torch.arange(n, device=device) * BLOCK
    last = first + BLOCK - 1
    # Distances in a block run from nearest to farthest; a negative distance is a pair that causality forbids.
    nearest = (first[:, None] - last[None, :])[None]
    farthest = (torch.clamp(last, max=T - 1)[:, None] - first[None, :])[None]
    some = torch.zeros(len(heads), n, n, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    bounds = torch.tensor(heads, device=device)
    for interval in bounds.unbind(1):
        lo, hi = interval[:, 0, None, None], interval[:, 1, None, None]
        some |= (torch.maximum(nearest, lo) <= torch.minimum(farthest, hi - 1)) & (farthest >= 0) & (lo < hi)
        every |= (nearest >= lo) & (farthest < hi) & (nearest >= 0)
    return some[None], every[None]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as FlexAttention stores it: their number per row, and their columns, kept ones first."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
