"""The factor on the scores, for kernels that know positive ones only."""

from __future__ import annotations

import math

from torch import Tensor


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Queries ``(..., D)`` and a positive factor on their scores, ``D ** -0.5`` where ``scale`` is None.

    Kernels mask scores before they scale them, or take a row's maximum before: a masked ``-inf`` times a factor of zero
    is NaN, and times a negative one the largest score of all. The sign of such a factor goes into the queries.

    :raises ValueError: the factor is not finite.
    """
    if scale is None:
        return q, q.shape[-1] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be a finite number")
    if scale > 0:
        return q, scale
    return q * (-1.0 if scale else 0.0), -scale or 1.0
