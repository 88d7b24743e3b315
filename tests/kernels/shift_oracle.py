"""Attention over distance intervals by the shift identity: a second definition, of which no kernel knows anything.

The pairs at distances ``[lo, hi)`` are an ordinary sliding window of ``hi - lo`` between ``q[lo:]`` and
``k[:T - lo]``. Two intervals are two such calls merged by their log-sum-exp. The backward pass is one ordinary
attention backward per interval, given the *merged* output and log-sum-exp; the gradients add up.
"""

import torch
from torch import Tensor


def _window(q, k, width):
    """Where a query of the shifted problem sees a key: at distances ``0..width``."""
    d = torch.arange(len(q))[:, None] - torch.arange(len(k))[None, :]
    return (d >= 0) & (d < width)


def _merged_head(q, k, v, intervals, scale):
    """Output and log-sum-exp of one head, ``(T, D)`` and ``(T,)``."""
    T = len(q)
    out, lse = torch.zeros_like(q), q.new_full((T,), float("-inf"))
    for lo, hi in intervals:
        if lo >= min(hi, T):
            continue
        qs, ks, vs = q[lo:], k[: T - lo], v[: T - lo]
        scores = (qs @ ks.T * scale).masked_fill(~_window(qs, ks, hi - lo), float("-inf"))
        part_lse = torch.logsumexp(scores, -1)
        part = torch.softmax(scores, -1) @ vs
        total = torch.logaddexp(lse[lo:], part_lse)
        merged = out[lo:] * (lse[lo:] - total).exp()[:, None] + part * (part_lse - total).exp()[:, None]
        out, lse = torch.cat([out[:lo], merged]), torch.cat([lse[:lo], total])
    return out, lse


def _head_gradients(q, k, v, out, lse, d_out, intervals, scale):
    T = len(q)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    delta = (out * d_out).sum(-1)
    for lo, hi in intervals:
        if lo >= min(hi, T):
            continue
        qs, ks, vs, do = q[lo:], k[: T - lo], v[: T - lo], d_out[lo:]
        weights = ((qs @ ks.T * scale) - lse[lo:, None]).exp() * _window(qs, ks, hi - lo)
        d_scores = weights * (do @ vs.T - delta[lo:, None]) * scale
        dq[lo:] += d_scores @ ks
        dk[: T - lo] += d_scores.T @ qs
        dv[: T - lo] += weights.T @ do
    return dq, dk, dv


def shifted_attention(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, d_out_BTHD: Tensor, heads, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients in q, k, v; ``heads``: two intervals for each head. Not differentiable: no autograd."""
    B, _, H, _ = q_BTHD.shape
    group = H // k_BTGD.shape[2]
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q_BTHD, q_BTHD, k_BTGD, v_BTGD))
    for b in range(B):
        for h, intervals in enumerate(heads):
            g = h // group
            q, k, v, d_out = q_BTHD[b, :, h], k_BTGD[b, :, g], v_BTGD[b, :, g], d_out_BTHD[b, :, h]
            out[b, :, h], lse = _merged_head(q, k, v, intervals, scale)
            dq[b, :, h], dkh, dvh = _head_gradients(q, k, v, out[b, :, h], lse, d_out, intervals, scale)
            dk[b, :, g] += dkh
            dv[b, :, g] += dvh
    return out, dq, dk, dv
