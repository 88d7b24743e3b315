"""Attention on a CPU: every chunk of queries meets only the keys that its head's distances reach.

Distance intervals become windows of equal size (see :mod:`.strips`), which go through batched matrix products and a
softmax, as many at a time as stay in a core's cache. Two intervals of a head are merged by their log-sum-exp. Patterns that
are no distance intervals use SDPA under a dense mask, a byte for each head, query and key, and for each row of the batch
where the mask follows the content.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import Call
from .documents import document_spans
from .reference import nothing, sdpa, visible
from .strips import Block, Span, Stack, Strips, stacks

BLOCK = 2**17
"""Scores that one thread computes at a time: with their gradients they fit the second-level cache of one core."""

STACKED = 2**20
"""Numbers of one tensor that are stacked at a time, if a row of some heads has no more."""

KEPT = 2**24
"""Scores up to which the forward pass keeps its probabilities (64 MiB in float32): beyond, the backward makes them anew."""


def run(call: Call) -> Tensor:
    """Attention and gradients, in float32 at least. Memory O(T * band), not O(T^2), for interval patterns."""
    q_BTHD, k_BTGD, v_BTGD, pattern, cu_doc_lens, scale, head_offset = call
    B, T, H, D = q_BTHD.shape
    table = pattern.table
    if table is None:
        return sdpa(call, attn_mask=visible(call))
    heads = table[head_offset : head_offset + H]
    # A mask of distances within documents is that mask on each document by itself.
    spans: tuple[Span, ...] = ((0, B, 0, T),)
    if cu_doc_lens is not None:
        spans = tuple((row, row + 1, start, stop) for row, start, stop in document_spans(cu_doc_lens, B, T))
    if all(lo == 0 and hi >= T for (lo, hi), _ in heads):
        return _dense(call, spans)
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    plan = stacks(heads, spans, exact, block=BLOCK * torch.get_num_threads(), tokens=STACKED // D)
    if not plan:
        return nothing(q_BTHD, k_BTGD, v_BTGD)
    group = H // k_BTGD.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k_BTGD, v_BTGD))
    return _windows(q_BTHD, k, v, plan, scale, exact)


def _dense(call: Call, spans: tuple[Span, ...]) -> Tensor:
    """Causal attention within spans that follow each other row by row."""
    if len(spans) == 1:
        return sdpa(call, is_causal=True)
    rows: list[list[Tensor]] = [[] for _ in call.q_BTHD]
    for first, last, start, stop in spans:
        q, k, v = (x[first:last, start:stop] for x in call[:3])
        rows[first].append(sdpa(call._replace(q_BTHD=q, k_BTGD=k, v_BTGD=v), is_causal=True))
    return torch.cat([torch.cat(parts, dim=1) for parts in rows])


@torch.compiler.disable  # a loop over blocks of a size that the cache sets: nothing that a compiler would do better
def _windows(q: Tensor, k: Tensor, v: Tensor, plan: tuple[Stack, ...], scale: float, exact: torch.dtype) -> Tensor:
    return _Windows.apply(q, k, v, plan, scale, exact)


Part = tuple[Strips, Tensor, Tensor]
"""Strips, their output and their log-sum-exp, ``(rows, tokens, heads, D)`` and ``(rows, tokens, heads, 1)``."""


class _Windows(torch.autograd.Function):
    """Attention of ``(B, T, H, D)`` tensors over all stacks of a plan."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: tuple[Stack, ...], scale: float, exact: torch.dtype
    ) -> Tensor:
        keep = any(ctx.needs_input_grad) and sum(stack.scores for stack in plan) <= KEPT
        merging = any(strips.second for stack in plan for strips in stack.strips)
        kept: list[tuple[_Stacked, list[Tensor]] | None] = []
        parts: list[Part] = []
        for stack in plan:
            stacked = _Stacked.of(stack, q, k, v, scale, exact)
            out, lse, probabilities = _forward(stacked, merging)
            kept.append((stacked, probabilities) if keep else None)
            parts += zip(stack.strips, _unstacked(stack, out), _unstacked(stack, lse), strict=True)
        out, second = _merged(parts, q, exact)
        ctx.save_for_backward(q, k, v, out, second if merging else None)
        ctx.plan, ctx.scale, ctx.exact, ctx.kept = plan, scale, exact, kept
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, second = ctx.saved_tensors
        d_out = d_out.to(ctx.exact)
        delta = (d_out * out).sum(-1, keepdim=True)
        dq, dk, dv = (torch.zeros(x.shape, dtype=ctx.exact) for x in (q, k, v))
        for stack, kept in zip(ctx.plan, ctx.kept, strict=True):
            stacked, probabilities = kept or (_Stacked.of(stack, q, k, v, ctx.scale, ctx.exact), None)
            shares = None if second is None else _shares(stack, second)
            d_outs, deltas = (_stacked(stack, _queries(stack, x), ctx.exact, shares) for x in (d_out, delta))
            grads = _backward(stacked, d_outs, deltas, probabilities)
            for strips, *parts in zip(stack.strips, *(_unstacked(stack, grad) for grad in grads), strict=True):
                dq[strips.rows, strips.queries, strips.heads].add_(parts[0], alpha=ctx.scale)
                dk[strips.rows, strips.keys, strips.heads].add_(parts[1])
                dv[strips.rows, strips.keys, strips.heads].add_(parts[2])
        return *(grad.to(x.dtype) for grad, x in ((dq, q), (dk, k), (dv, v))), None, None, None


# ---- strips ----------------------------------------------------------------------------------------------------------


class _Stacked(NamedTuple):
    """A stack's queries, scaled, its keys and its values, ``(strips, chunks * C, D)`` each."""

    stack: Stack
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, stack: Stack, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> _Stacked:
        qs = _stacked(stack, _queries(stack, q), dtype, [scale] * len(stack.strips))
        return cls(stack, qs, *(_stacked(stack, _keys(stack, x), dtype) for x in (k, v)))


def _queries(stack: Stack, x_BTHD: Tensor) -> list[Tensor]:
    return [x_BTHD[strips.rows, strips.queries, strips.heads] for strips in stack.strips]


def _keys(stack: Stack, x_BTHD: Tensor) -> list[Tensor]:
    return [x_BTHD[strips.rows, strips.keys, strips.heads] for strips in stack.strips]


def _shares(stack: Stack, second: Tensor) -> list[Tensor]:
    """The share of each part in the outputs of its queries."""
    shares = zip(stack.strips, _queries(stack, second), strict=True)
    return [share if strips.second else 1 - share for strips, share in shares]


def _stacked(
    stack: Stack, parts: list[Tensor], dtype: torch.dtype, factors: list[Tensor] | list[float] | None = None
) -> Tensor:
    """Parts ``(rows, tokens, heads, D)``, times a factor each, as ``(strips, chunks * C, D)``; zeros after each."""
    x = torch.empty(stack.size, stack.chunks * stack.chunk, parts[0].shape[3], dtype=dtype)
    for i, (view, part) in enumerate(zip(_views(stack, x), parts, strict=True)):
        length = part.shape[1]
        if factors is None:
            view[:, :length] = part
        else:
            torch.mul(part.to(dtype), factors[i], out=view[:, :length])
        view[:, length : -(-length // stack.chunk) * stack.chunk] = 0
    return x


def _unstacked(stack: Stack, x: Tensor) -> list[Tensor]:
    """The parts of a stack, ``(rows, tokens, heads, D)`` each: views."""
    return [view[:, : strips.length] for view, strips in zip(_views(stack, x), stack.strips, strict=True)]


def _views(stack: Stack, x: Tensor) -> list[Tensor]:
    pieces = x.split([strips.size for strips in stack.strips])
    rows = [strips.rows.stop - strips.rows.start for strips in stack.strips]
    return [piece.unflatten(0, (n, -1)).transpose(1, 2) for piece, n in zip(pieces, rows, strict=True)]


def _merged(parts: list[Part], q_BTHD: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """All parts as one output, and the share of the second interval in every query's, ``(B, T, H, 1)``."""
    out = torch.zeros(q_BTHD.shape, dtype=exact)
    second = torch.zeros(*q_BTHD.shape[:3], 1, dtype=exact)
    lse = torch.full_like(second, float("-inf"))
    for strips, part, part_lse in sorted(parts, key=lambda part: part[0].second):
        at = strips.rows, strips.queries, strips.heads
        if strips.second:
            second[at] = torch.sigmoid(part_lse - lse[at])
            out[at].lerp_(part, second[at])
        else:
            out[at], lse[at] = part, part_lse
    return out, second


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _forward(stacked: _Stacked, merging: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, log-sum-exps if parts are to be merged, ``(strips, chunks * C, 1)``, and each block's probabilities."""
    stack, q, k, v = stacked
    out, lse = torch.empty_like(q), q.new_zeros(*q.shape[:2], 1)
    probabilities = []
    for block in stack.blocks:
        scores = _scores(stack, block, q, k)
        p = torch.softmax(scores, -1)
        _chunks(stack, block, out).copy_(torch.bmm(p, _chunks(stack, block, v, block.before)))
        if merging:
            torch.sub(scores.amax(-1, True), p.amax(-1, True).log_(), out=_chunks(stack, block, lse))
        probabilities.append(p)
    return out, lse, probabilities


def _backward(
    stacked: _Stacked, d_out: Tensor, delta: Tensor, probabilities: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries, the keys and the values."""
    stack, q, k, v = stacked
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i, block in enumerate(stack.blocks):
        cut = functools.partial(_chunks, stack, block)
        p = torch.softmax(_scores(stack, block, q, k), -1) if probabilities is None else probabilities[i]
        ds = torch.bmm(cut(d_out), cut(v, block.before).transpose(1, 2)).sub_(cut(delta)).mul_(p)
        cut(dq).copy_(torch.bmm(ds, cut(k, block.before)))
        cut(dk, block.before).add_(torch.bmm(ds.transpose(1, 2), cut(q)))
        cut(dv, block.before).add_(torch.bmm(p.transpose(1, 2), cut(d_out)))
    return dq, dk, dv


def _scores(stack: Stack, block: Block, q: Tensor, k: Tensor) -> Tensor:
    mask = stack.mask[..., -(block.before + 1) * stack.chunk :]
    return torch.baddbmm(mask, _chunks(stack, block, q), _chunks(stack, block, k, block.before).transpose(1, 2))


def _chunks(stack: Stack, block: Block, x: Tensor, before: int = 0) -> Tensor:
    """A block's chunk of ``(strips, chunks * C, D)`` and some chunks before it: a view."""
    C = stack.chunk
    return x[block.first : block.last, (block.chunk - before) * C : (block.chunk + 1) * C]
