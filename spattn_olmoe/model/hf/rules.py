"""Patterns as the rules that an exported model computes, which knows no pattern types."""

from __future__ import annotations

from dataclasses import replace

from ...patterns import UNBOUNDED, Pattern
from ...patterns.bands import SPAttention
from ...patterns.bigbird import BigBird
from ...patterns.longformer import PLAIN_CAUSAL_UP_TO, Longformer
from ...patterns.reformer import Reformer
from ...patterns.sinks import SPAttentionSinks
from ...serving.modeling_spattn_olmoe import AttentionRule


def rule_of(pattern: Pattern) -> AttentionRule:
    """The rule that attends what a pattern attends, at any length.

    :raises ValueError: distances, residues and global tokens do not describe the pattern.
    """
    if pattern.follows_input:
        raise _refused(pattern, "follows_input=true, so that its mask changes with every new token")
    table = pattern.table
    if table is not None:
        return AttentionRule(tuple(tuple(interval for interval in head if interval[0] < interval[1]) for head in table))
    if isinstance(pattern, SPAttentionSinks):  # each document has its own there, as if it were alone
        bands = SPAttention(
            pattern.n_heads, pattern.band_length, head_order=pattern.head_order, local_sharing=pattern.local_sharing
        )
        return replace(rule_of(bands), global_tokens=pattern.sinks)
    if isinstance(pattern, Reformer) and pattern.follows_content:
        raise _refused(pattern, "buckets=lsh, so that its mask depends on queries and keys")
    if isinstance(pattern, BigBird) and pattern.random_links == "seeded":
        raise _refused(pattern, "random_links=seeded, which no rule on distances describes")
    if isinstance(pattern, (Longformer, BigBird, Reformer)):
        return _released(pattern)
    raise _refused(pattern, "a mask that is not made of distance intervals: let it state head_intervals")


def is_dense(rule: AttentionRule) -> bool:
    """Whether a rule attends every distance in every head."""
    return all(head == ((0, UNBOUNDED),) for head in rule.intervals)


def _released(pattern: Longformer | BigBird | Reformer) -> AttentionRule:
    """The masks of the paper's released code, alike in all heads."""
    H = pattern.n_heads
    if pattern.band_length <= PLAIN_CAUSAL_UP_TO:
        return AttentionRule((((0, UNBOUNDED),),) * H)
    if isinstance(pattern, Reformer):
        nb = pattern.n_buckets  # buckets of two tokens differ by 3 d mod nb, circularly
        near = tuple(r for r in range(nb) if 3 * r % nb in (0, 1, nb - 1))
        return AttentionRule((((0, pattern.local + 1),),) * H, period=nb, residues=near)
    local = (((0, pattern.window + 1),),) * H
    if isinstance(pattern, BigBird):
        return AttentionRule(local, period=pattern.stride, residues=(0,), global_tokens=pattern.n_global)
    return AttentionRule(local, global_tokens=pattern.n_global)


def _refused(pattern: Pattern, why: str) -> ValueError:
    return ValueError(
        f"attention.type={pattern.name} cannot be exported: it has {why}; evaluate it here with scripts/evaluate.py"
    )
