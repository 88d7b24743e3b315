"""OLMoE whose heads attend their own distances, for transformers (5.13 or newer). This file needs torch and transformers only.

Load the folder that it lies in with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Weights,
names and everything but the mask are transformers' own ``OlmoeForCausalLM``. Which keys a query attends is stated by
``attention_rules`` in ``config.json``, layer by layer and head by head (see :class:`AttentionRule`);
``attention_patterns`` names what those rules are. With the package ``spattn_olmoe`` installed its kernels compute whole
sequences; without it FlexAttention does on CUDA, and PyTorch's SDPA, some queries at a time, elsewhere.

Shapes: ``B`` sequences, ``H`` query heads, ``T`` queries, ``S`` keys (with a static cache its capacity), ``D`` head dimension.
"""

from __future__ import annotations

import ast
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, OlmoeConfig, OlmoeForCausalLM

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    raise ImportError("this model needs transformers 5.13 or newer: pip install -U transformers") from None

log = logging.getLogger(__name__)

IMPLEMENTATION = "spattn_olmoe"
"""The only ``attn_implementation`` of these models: any other would be dense."""

NO_DROPOUT = "none; dense attention is not this model: load it with trust_remote_code=True"
"""``attention_dropout`` of the config. No number, so that transformers' own OlmoeConfig refuses the file and shows why."""

MASK_CELLS = 2**24
"""(query, key) cells of all heads whose mask is held at a time where SDPA computes: bytes, and about as many floats."""

FEW_QUERIES = 16
"""Up to so many queries, as in decoding, FlexAttention on CUDA is not worth its block mask."""


# ---- what is attended ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionRule:
    """The keys that a query attends in one layer, by distance ``d = query - key >= 0`` within one document.

    :param intervals: for each query head the half-open intervals ``[lo, hi)`` of distances that it attends.
    :param period: with ``residues``: every distance with ``d % period`` among them is attended too, in all heads.
    :param global_tokens: the first so many tokens attend, and are attended by, all others, in all heads.
    """

    intervals: tuple[tuple[tuple[int, int], ...], ...]
    period: int = 0
    residues: tuple[int, ...] = ()
    global_tokens: int = 0

    @classmethod
    def from_config(cls, entry: dict[str, Any]) -> AttentionRule:
        """One entry of ``attention_rules``."""
        intervals = tuple(tuple((lo, hi) for lo, hi in head) for head in entry["intervals"])
        return cls(intervals, entry["period"], tuple(entry["residues"]), entry["global_tokens"])

    def to_config(self) -> dict[str, Any]:
        """What :meth:`from_config` takes, in lists and numbers."""
        intervals = [[list(interval) for interval in head] for head in self.intervals]
        return {
            "intervals": intervals,
            "period": self.period,
            "residues": list(self.residues),
            "global_tokens": self.global_tokens,
        }

    def allows(self, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether head ``h`` lets a query attend a key, by their places in one document: integers that broadcast."""
        d = query - key
        bounds, periodic = _tables(self, d.device)
        allowed = torch.zeros_like(d, dtype=torch.bool)
        for n in range(bounds.shape[1]):
            allowed = allowed | ((d >= bounds[h, n, 0]) & (d < bounds[h, n, 1]))
        if periodic is not None:
            allowed = allowed | periodic[d % self.period]
        if self.global_tokens:
            allowed = allowed | (query < self.global_tokens) | (key < self.global_tokens)
        return allowed & (d >= 0)


@functools.lru_cache(maxsize=128)
@torch.inference_mode(False)  # made while generating, kept, and then wanted in training
def _tables(rule: AttentionRule, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Bounds ``(H, intervals, 2)``, heads with fewer filled up with empty ones, and which residues are attended."""
    most = max(1, *(len(head) for head in rule.intervals))
    bounds = torch.tensor([[*head, *[(0, 0)] * (most - len(head))] for head in rule.intervals], device=device)
    if not rule.residues:
        return bounds, None
    periodic = torch.zeros(rule.period, dtype=torch.bool)
    periodic[list(rule.residues)] = True
    return bounds, periodic.to(device)


# ---- the config ------------------------------------------------------------------------------------------------------


class SPAttnOlmoeConfig(OlmoeConfig):
    """OlmoeConfig with a rule for every layer, and no attention implementation but this file's."""

    model_type = "spattn_olmoe"

    attention_patterns: list | None = None
    attention_rules: list | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        given = config_dict.get("attention_dropout", NO_DROPOUT)
        if given not in (0, NO_DROPOUT):
            raise ValueError(f"attention_dropout={given!r}: this model has none")
        return super().from_dict(config_dict | {"attention_dropout": 0.0}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"attention_dropout": NO_DROPOUT}

    @property
    def _attn_implementation_internal(self) -> str:
        return IMPLEMENTATION

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        if value not in (None, IMPLEMENTATION):
            raise ValueError(
                f"attn_implementation={value!r} would be dense: the heads of this model attend their own distances, "
                f"which only {IMPLEMENTATION!r}, the code beside its weights, computes; leave attn_implementation out"
            )


# ---- the mask: where every token is in its document ------------------------------------------------------------------


def token_places(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What transformers hands to every layer as the mask: the document and the place of queries and keys.

    Distances are counted over the tokens that padding leaves, within the document of packed input: padding on either
    side, packed documents and the empty end of a static cache all come out of it, in O(T + S) memory.

    :returns: int32 ``(B, 2, 1, T + S)``: ``[:, 0]`` documents, -1 for keys that are padding, ``[:, 1]`` places; queries first.
    """
    if use_vmap or mask_function is None:
        raise ValueError("this model takes no mask function besides the causal one")
    slot = torch.arange(kv_length, device=device)
    row = torch.arange(batch_size, device=device)[:, None]
    valid = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        given = attention_mask[:, :kv_length].to(device=device, dtype=torch.bool)
        valid = F.pad(given, (0, kv_length - given.shape[1]))
    # A token that may not attend the one before it begins a document.
    joined = mask_function(row, torch.zeros_like(row), slot[None, 1:], slot[None, :-1])
    begins = F.pad(~joined.expand(batch_size, kv_length - 1), (1, 0), value=True)
    before = valid.cumsum(1) - valid.long()  # tokens before each one, in its row
    place = before - torch.where(begins, before, 0).cummax(1).values
    document = begins.cumsum(1) - 1
    query = q_offset + torch.arange(q_length, device=device)
    queries = torch.stack([document[:, query], torch.where(valid, place, -1)[:, query]], dim=1)
    keys = torch.stack([torch.where(valid, document, -1), place], dim=1)
    return torch.cat([queries, keys], dim=2).to(torch.int32)[:, :, None]


def _split(places: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Documents and places of queries ``(B, T)``, and of keys ``(B, S)``."""
    queries, keys = places[:, :, 0, :T], places[:, :, 0, T:]
    return queries[:, 0], queries[:, 1], keys[:, 0], keys[:, 1]


# ---- attention -------------------------------------------------------------------------------------------------------


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: ``(B, H, T, D)`` in, ``(B, T, H, D)`` out; zeros for a query without keys."""
    T, S = query.shape[2], key.shape[2]
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.int32:
        raise ValueError(
            "this model builds its own mask: give attention_mask (batch, length) of zeros and ones, or none"
        )
    if attention_mask.shape[1:] != (2, 1, T + S):
        raise ValueError(f"a mask for {attention_mask.shape[-1]} tokens was handed to {T} queries and {S} keys")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: this model has none")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: the weights of all pairs are not kept here")
    rule = _rule(module)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    heads_last = _by_package(module, query, key, value, attention_mask, rule, scale)
    if heads_last is not None:
        return heads_last, None
    flex = query.device.type == "cuda" and T > FEW_QUERIES and not torch.compiler.is_compiling()
    compute = by_flex if flex else by_sdpa
    return compute(query, key, value, attention_mask, rule, scale).transpose(1, 2), None


def _rule(module: Any) -> AttentionRule:
    if "attention_rule" not in module.__dict__:
        module.__dict__["attention_rule"] = AttentionRule.from_config(module.config.attention_rules[module.layer_idx])
    return module.__dict__["attention_rule"]


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, places: Tensor, rule: AttentionRule, scale: float) -> Tensor:
    """SDPA under a mask, as many queries at a time as :data:`MASK_CELLS` has room for: ``(B, H, T, D)``."""
    B, H, T, _ = query.shape
    S = key.shape[2]
    q_document, q_place, k_document, k_place = (x[:, None] for x in _split(places, T))
    head = torch.arange(H, device=query.device)[:, None, None]
    step = max(1, MASK_CELLS // (B * H * S))
    parts = []
    for start in range(0, T, step):
        part = slice(start, start + step)
        together = q_document[:, :, part, None] == k_document[:, :, None]
        mask = together & rule.allows(head, q_place[:, :, part, None], k_place[:, :, None])
        dead = ~mask.any(-1, keepdim=True)  # attends all, so that no gradient is NaN, and counts for nothing
        out = F.scaled_dot_product_attention(
            query[:, :, part], key, value, attn_mask=mask | dead, scale=scale, enable_gqa=H != key.shape[1]
        )
        parts.append(out.masked_fill(dead, 0.0))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def by_flex(query: Tensor, key: Tensor, value: Tensor, places: Tensor, rule: AttentionRule, scale: float) -> Tensor:
    """FlexAttention, compiled on CUDA: blocks that hold no pair are skipped, and no mask is kept: ``(B, H, T, D)``."""
    kept = places.__dict__.setdefault("block_masks", {})  # all layers of one rule share it
    if rule not in kept:
        kept[rule] = _block_mask(places, rule, query.shape[1], query.shape[2])
    gqa = query.shape[1] != key.shape[1]
    return _flex(query.device.type)(query, key, value, block_mask=kept[rule], scale=scale, enable_gqa=gqa)


def _block_mask(places: Tensor, rule: AttentionRule, H: int, T: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    q_document, q_place, k_document, k_place = (x.contiguous() for x in _split(places, T))

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (q_document[b, i] == k_document[b, j]) & rule.allows(h, q_place[b, i], k_place[b, j])

    B, S, device = *k_place.shape, places.device
    return create_block_mask(mask_mod, B, H, T, S, device=device, _compile=device.type == "cuda")


@functools.cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    return torch.compile(attend) if device_type == "cuda" else attend


# ---- the package's kernels, where it is installed --------------------------------------------------------------------


def _by_package(
    module: Any, query: Tensor, key: Tensor, value: Tensor, places: Tensor, rule: AttentionRule, scale: float
) -> Tensor | None:
    """Attention of whole sequences by spattn_olmoe: ``(B, T, H, D)``; None where it is not there or cannot serve."""
    T = query.shape[2]
    if T != key.shape[2] or rule.period or rule.global_tokens or torch.compiler.is_compiling():
        return None
    attention = _package_attention(rule, repr(module.config.attention_patterns[module.layer_idx]))
    if attention is None:
        return None
    documents, whole = _documents(places, T)
    if not whole:
        return None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, cu_doc_lens=documents, scale=scale)


@functools.lru_cache(maxsize=128)
def _package_attention(rule: AttentionRule, entry: str) -> Callable[..., Tensor] | None:
    """Attention of an installed spattn_olmoe under its pattern of this rule; None where there is none."""
    try:  # transformers demands what is imported anywhere else
        from spattn_olmoe import attention
        from spattn_olmoe.patterns import build_pattern

        pattern = build_pattern(**ast.literal_eval(entry))
    except (ImportError, ValueError, TypeError):  # not installed, or a type that it does not know
        return None
    table = pattern.table
    if table is None or tuple(tuple((lo, hi) for lo, hi in head if lo < hi) for head in table) != rule.intervals:
        log.warning(
            "the installed spattn_olmoe has other distances for %s than this model: its kernels are not used", entry
        )
        return None
    return functools.partial(attention, pattern=pattern)


def _documents(places: Tensor, T: int) -> tuple[Tensor | None, bool]:
    """Cumulative lengths of the runs of one document or of padding, for all rows, or None where each row is one.

    The second value is False where padding lies within a document: its distances are no differences of positions.
    """
    kept = places.__dict__  # all layers share it
    if "documents" not in kept:
        _, _, document, place = _split(places, T)
        begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
        slot = torch.arange(T, device=places.device)
        start = torch.where(begins, slot, 0).cummax(1).values
        whole = bool(((document < 0) | (place == slot - start)).all())
        bounds = torch.cat([begins.flatten().nonzero()[:, 0], begins.new_tensor([begins.numel()], dtype=torch.long)])
        kept["documents"] = None if len(bounds) == len(places) + 1 else bounds.to(torch.int32), whole
    return kept["documents"]


# ---- the model -------------------------------------------------------------------------------------------------------


class SPAttnOlmoeForCausalLM(OlmoeForCausalLM):
    """Transformers' OLMoE under the rules of its config."""

    config_class = SPAttnOlmoeConfig
    _supports_attention_backend = False  # engines that bring attention of their own would be dense

    def __init__(self, config: SPAttnOlmoeConfig):
        rules = config.attention_rules or []
        heads = {len(rule["intervals"]) for rule in rules}
        if len(rules) != config.num_hidden_layers or heads != {config.num_attention_heads}:
            raise ValueError(
                f"config.attention_rules has {len(rules)} layers of {sorted(heads)} heads but the model "
                f"{config.num_hidden_layers} of {config.num_attention_heads}: restore config.json"
            )
        super().__init__(config)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, token_places)
# Files have one tensor per expert, as published; transformers converts them for its own model types only.
register_checkpoint_conversion_mapping(
    SPAttnOlmoeConfig.model_type, get_checkpoint_conversion_mapping("olmoe"), overwrite=True
)
