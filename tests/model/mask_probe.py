"""Does a model attend what its patterns say, and nothing else? Keys are changed one at a time and outputs are watched.

Every distance is attended by some head of a banded model, so that all of a later token's logits may depend on an earlier
token. The probe silences all heads but one: then logits depend on a token by that head's distances alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spattn_olmoe.patterns import Pattern

MOVES = 1e-4
"""The least that a logit of these models moves where it depends on a changed key; rounding is a hundred times less."""

CHANGED = (0, 5, 11, 30)
"""Positions that are changed."""


@torch.no_grad()
def only_head(weights: list[Tensor], layer: int, head: int, n_heads: int) -> list[Tensor]:
    """Output projections ``(d_model, heads * head_dim)`` of all layers that let one head of one layer through."""
    out = []
    for i, weight in enumerate(weights):
        kept = torch.zeros_like(weight)
        if i == layer:
            part = slice(head * weight.shape[1] // n_heads, (head + 1) * weight.shape[1] // n_heads)
            kept[:, part] = weight[:, part]
        out.append(kept)
    return out


def probes(patterns: list[Pattern]) -> Iterator[tuple[int, int]]:
    """Layers and heads to look at: of two heads whose distances differ, the first and the last."""
    for layer, pattern in enumerate(patterns):
        yield from ((layer, head) for head in (0, pattern.n_heads - 1))


@torch.no_grad()
def wrong_pairs(logits_of: Callable[[Tensor], Tensor], ids: Tensor, pattern: Pattern, head: int) -> list[str]:
    """Pairs that the model treats otherwise than the head's mask, in words; none for a correct model.

    :param logits_of: ids ``(1, T)`` to logits ``(1, T, vocabulary)`` of a model that has been given only this head.
    """
    T = ids.shape[1]
    mask = pattern.dense_mask(T)[head]
    before, wrong = logits_of(ids), []
    for key in CHANGED:
        changed = ids.clone()
        changed[0, key] = (ids[0, key] - 2 + 7) % 60 + 2
        moved = (logits_of(changed) - before)[0].abs().amax(-1) > MOVES
        expected = mask[:, key] | (torch.arange(T) == key)
        wrong += [
            f"query {q}, key {key}: {'moves' if moved[q] else 'does not move'}"
            for q in (moved != expected).nonzero()[:, 0]
        ]
    return wrong
