"""Floating-point operations of training, exact for the mask."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_core.nn.transformer import Transformer

from ..patterns import causal_pairs
from .mixer import PatternAttention


@dataclass(frozen=True)
class Flops:
    """Forward and backward FLOPs per token: 6 a multiplied parameter, 12 a head dimension for each attended pair.

    :param total: of the model as it attends.
    :param attention: the part of ``total`` that attended pairs cost, projections not included.
    :param dense: of the same model if every head attended every earlier key.
    """

    total: int
    attention: int
    dense: int


def flops_per_token(model: Transformer, seq_len: int) -> Flops:
    """Count a model's FLOPs per token at a sequence length. The model may live on the meta device."""
    total = model.num_flops_per_token(seq_len)
    attention = dense_attention = 0
    for module in model.modules():
        if isinstance(module, PatternAttention):
            attention += 12 * module.head_dim * module.pattern.attended_pairs(seq_len) // seq_len
            dense_attention += 12 * module.head_dim * module.n_heads * causal_pairs(seq_len) // seq_len
    return Flops(total=total, attention=attention, dense=total - attention + dense_attention)
