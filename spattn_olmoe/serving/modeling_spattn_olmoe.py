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
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, OlmoeConfig, OlmoeForCausalLM, OlmoeModel

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

BLOCK = 128
"""Side of the blocks that FlexAttention computes or skips; its default."""

FLEX_MIN_HEAD_DIM = 16
"""FlexAttention's kernels on CUDA serve no smaller heads."""


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

    def on(self, device: torch.device | str) -> Allows:
        """The rule as a function of tensors on a device: ``allows(h, query, key)``, integers that broadcast.

        It tells whether head ``h`` lets a query attend a key, by their places in one document. What it looks up is made here:
        a compiler that traces the function finds tensors, and no rule of its own to compile for.
        """
        bounds, periodic = _tables(self, torch.device(device))
        period, global_tokens = self.period, self.global_tokens

        def allows(h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            d = query - key
            terms = [(d >= lo[h]) & (d < hi[h]) for lo, hi in bounds]
            if periodic is not None:
                terms.append(periodic[d % period])
            if global_tokens:
                terms.append((query < global_tokens) | (key < global_tokens))
            return functools.reduce(torch.logical_or, terms) & (d >= 0)

        return allows


Allows = Callable[[Tensor, Tensor, Tensor], Tensor]
Tables = tuple[list[tuple[Tensor, Tensor]], Tensor | None]


@torch.compiler.assume_constant_result  # the compiler looks through a cache, and would make them in every step
def _tables(rule: AttentionRule, device: torch.device) -> Tables:
    return _made_tables(rule, device)


@functools.lru_cache(maxsize=128)
@torch.inference_mode(False)  # made while generating, kept, and then wanted in training
def _made_tables(rule: AttentionRule, device: torch.device) -> Tables:
    """The first, second, ... interval of all heads, ``lo (H,)`` and ``hi (H,)``, and which residues are attended.

    A head with fewer intervals has empty ones.
    """
    most = max(1, *(len(head) for head in rule.intervals))
    heads = torch.tensor([[*head, *[(0, 0)] * (most - len(head))] for head in rule.intervals])
    bounds = [(lo.contiguous().to(device), hi.contiguous().to(device)) for lo, hi in heads.permute(1, 2, 0)]
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


_INPUTS = tuple(inspect.signature(OlmoeModel.forward).parameters)[1:]
_FOR_FLASH_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def keep_documents_apart(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Before every forward pass: packed documents are told apart with the default ``use_cache`` as well.

    transformers looks for them, where ``position_ids`` do not go on by one, only where it has neither a mask nor a cache; and
    it makes a cache unless told not to. A mask says that the positions are those of padded rows.
    """
    given = dict(zip(_INPUTS, args, strict=False)) | kwargs
    for name in _FOR_FLASH_ATTENTION:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} is given: this model tells packed documents apart by position_ids that begin again in each: give "
                f"those, and leave {', '.join(_FOR_FLASH_ATTENTION)} out"
            )
    positions, asked = given.get("position_ids"), given.get("use_cache")
    cached = any(given.get(name) is not None for name in ("past_key_values", "cache"))  # its name until 5.24, and since
    makes_cache = not cached and (model.config.use_cache if asked is None else asked)
    if positions is None or given.get("attention_mask") is not None or not (cached or makes_cache):
        return None
    if torch.compiler.is_compiling():  # no value can be looked at; without a cache transformers splits in any case
        packed = makes_cache
    else:
        packed = positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any())
    if packed and (cached or asked):
        raise ValueError(
            f"{'a cache' if cached else 'use_cache=True'} is given beside position_ids of packed documents, and a cache keeps "
            "one document a row: leave it out, or give the attention_mask of padded rows"
        )
    return ((), given | {"use_cache": False}) if packed else None


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
    compute = by_flex if _suits_flex(query) else by_sdpa
    return compute(query, key, value, attention_mask, rule, scale).transpose(1, 2), None


def _suits_flex(query: Tensor) -> bool:
    few = query.shape[2] <= FEW_QUERIES or query.shape[3] < FLEX_MIN_HEAD_DIM
    return query.device.type == "cuda" and not few and not torch.compiler.is_compiling()


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
    allows = rule.on(query.device)
    step = max(1, MASK_CELLS // (B * H * S))
    parts = []
    for start in range(0, T, step):
        part = slice(start, start + step)
        together = q_document[:, :, part, None] == k_document[:, :, None]
        mask = together & allows(head, q_place[:, :, part, None], k_place[:, :, None])
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
        kept[rule] = block_mask(places, rule, query.shape[2])
    gqa = query.shape[1] != key.shape[1]
    return _flex(query.device.type)(query, key, value, block_mask=kept[rule], scale=scale, enable_gqa=gqa)


def block_mask(places: Tensor, rule: AttentionRule, T: int) -> Any:
    """A rule for FlexAttention, of :data:`BLOCK` queries by as many keys a block: made without a mask of all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    q_document, q_place, k_document, k_place = (x.contiguous() for x in _split(places, T))
    allows = rule.on(places.device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (q_document[b, i] == k_document[b, j]) & allows(h, q_place[b, i], k_place[b, j])

    some, every = _blocks(places, rule, T)
    return BlockMask.from_kv_blocks(*_ordered(some & ~every), *_ordered(every), BLOCK, mask_mod, (T, k_place.shape[1]))


def _blocks(places: Tensor, rule: AttentionRule, T: int) -> tuple[Tensor, Tensor]:
    """Which blocks may hold an allowed pair, and which hold no other: bool ``(B, H, T / BLOCK, S / BLOCK)`` each.

    They follow from the least and the greatest document and place of a block's queries and keys.
    """
    ends = [_least_and_greatest(x) for x in _split(places, T)]
    (q_first, q_last), (q_low, q_high) = ([x[:, None, :, None] for x in pair] for pair in ends[:2])
    (k_first, k_last), (k_low, k_high) = ([x[:, None, None, :] for x in pair] for pair in ends[2:])
    meet = (q_first <= k_last) & (k_first <= q_last)
    alike = (q_first == q_last) & (k_first == k_last) & meet
    near, far = q_low - k_high, q_high - k_low
    bounds, periodic = _tables(rule, places.device)
    within = torch.zeros_like(meet)
    reached = torch.full_like(meet, periodic is not None)  # some distance of every period
    if rule.global_tokens:
        reached = (q_low < rule.global_tokens) | (k_low < rule.global_tokens) | reached
    for lo, hi in ((lo[:, None, None], hi[:, None, None]) for lo, hi in bounds):
        reached = reached | ((far >= lo) & (near < hi) & (lo < hi))
        within = within | ((near >= lo) & (far < hi))
    return reached & meet & (far >= 0), within & alike & (near >= 0)


def _least_and_greatest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every :data:`BLOCK` numbers of the rows ``(B, n)``; the last may be fewer."""
    n = x.shape[1]
    slot = torch.arange(-(-n // BLOCK) * BLOCK, device=x.device).clamp(max=n - 1)
    least, greatest = x[:, slot].unflatten(1, (-1, BLOCK)).aminmax(dim=-1)
    return least, greatest


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks as FlexAttention keeps them: how many each row has, and their columns, those that it has first."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@functools.cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    # Whole graphs: what cannot be compiled, or too often, ends with an error, where it would else keep all pairs.
    return torch.compile(attend, fullgraph=True) if device_type == "cuda" else attend


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
        for layer in self.model.layers:
            _rule(layer.self_attn)  # here: a compiler that meets it first cannot make one
        self.model.register_forward_pre_hook(keep_documents_apart, with_kwargs=True)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, token_places)
# Files have one tensor per expert, as published; transformers converts them for its own model types only.
register_checkpoint_conversion_mapping(
    SPAttnOlmoeConfig.model_type, get_checkpoint_conversion_mapping("olmoe"), overwrite=True
)
