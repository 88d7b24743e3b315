"""Weights under OLMo-core's names and under those of the published OLMoE, one tensor of OLMo-core's at a time.

The published layout has one tensor per expert, ``(out, in)`` each. Transformers 5 can also save all experts of a layer
fused: ``gate_up_proj (experts, 2 hidden, d_model)`` and ``down_proj (experts, d_model, hidden)``. OLMo-core keeps
``w1``, ``w2``, ``w3``, each ``(experts * hidden, d_model)``, and the router flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

OUTER = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
BLOCK = {
    "attention.w_q.weight": "self_attn.q_proj.weight",
    "attention.w_k.weight": "self_attn.k_proj.weight",
    "attention.w_v.weight": "self_attn.v_proj.weight",
    "attention.w_out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
ROUTER, ROUTER_PUBLISHED = "feed_forward_moe.router.weight", "mlp.gate.weight"
EXPERTS = {f"feed_forward_moe.experts.mlp.{w}": p for w, p in (("w1", "gate"), ("w2", "down"), ("w3", "up"))}
"""OLMo-core's expert weights, and the name of each expert's part in the published layout."""

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Shape:
    """The numbers that give the weights of an OLMoE their shapes."""

    vocab_size: int
    d_model: int
    n_layers: int
    kv_size: int
    experts: int
    hidden: int

    @classmethod
    def of(cls, config: Mapping[str, int]) -> Shape:
        """The shape that a ``config.json`` of transformers describes."""
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            d_model=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            kv_size=head_dim * config["num_key_value_heads"],
            experts=config["num_experts"],
            hidden=config["intermediate_size"],
        )

    def core(self) -> dict[str, tuple[int, ...]]:
        """OLMo-core's weights: name and shape, in the order in which they are used."""
        D, KV, E, F = self.d_model, self.kv_size, self.experts, self.hidden
        block: dict[str, tuple[int, ...]] = dict.fromkeys(BLOCK, (D,))
        block |= {f"attention.{w}.weight": (D, D) for w in ("w_q", "w_out")}
        block |= {f"attention.{w}.weight": (KV, D) for w in ("w_k", "w_v")}
        block |= {"attention.k_norm.weight": (KV,), ROUTER: (E * D,)} | dict.fromkeys(EXPERTS, (E * F, D))
        layers = {f"blocks.{i}.{name}": shape for i in range(self.n_layers) for name, shape in block.items()}
        ends = {"lm_head.norm.weight": (D,), "lm_head.w_out.weight": (self.vocab_size, D)}
        return {"embeddings.weight": (self.vocab_size, D), **layers, **ends}

    def published(self, fused: bool = False) -> dict[str, tuple[int, ...]]:
        """The weights of the published layout, or of the one with fused experts: name and shape."""
        D, E, F = self.d_model, self.experts, self.hidden
        out: dict[str, tuple[int, ...]] = {}
        for name, shape in self.core().items():
            layer, part = split(name)
            if part == ROUTER:
                out[layer + ROUTER_PUBLISHED] = (E, D)
            elif part not in EXPERTS:
                out[layer + (BLOCK | OUTER)[part]] = shape
            elif not fused:
                for e in range(E):
                    out[expert(layer, e, EXPERTS[part])] = (D, F) if EXPERTS[part] == "down" else (F, D)
        if fused:
            for i in range(self.n_layers):
                out[f"model.layers.{i}.mlp.experts.gate_up_proj"] = (E, 2 * F, D)
                out[f"model.layers.{i}.mlp.experts.down_proj"] = (E, D, F)
        return out

    def to_published(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One tensor of OLMo-core's in the published layout."""
        layer, part = split(name)
        if part == ROUTER:
            return {layer + ROUTER_PUBLISHED: tensor.view(self.experts, self.d_model)}
        if part not in EXPERTS:
            return {layer + (BLOCK | OUTER)[part]: tensor}
        each = tensor.view(self.experts, self.hidden, self.d_model)
        down = EXPERTS[part] == "down"
        return {expert(layer, e, EXPERTS[part]): (w.T if down else w).contiguous() for e, w in enumerate(each)}

    def from_published(self, name: str, read: Read, fused: bool) -> Tensor:
        """One tensor of OLMo-core's, put together from what ``read`` reads by its published name."""
        layer, part = split(name)
        if part == ROUTER:
            return read(layer + ROUTER_PUBLISHED).flatten()
        if part not in EXPERTS:
            return read(layer + (BLOCK | OUTER)[part])
        which = EXPERTS[part]
        if not fused:
            first = read(expert(layer, 0, which))
            out = first.new_empty(self.experts, self.hidden, self.d_model)
            for e in range(self.experts):
                one = read(expert(layer, e, which))
                out[e] = one.T if which == "down" else one
        elif which == "down":
            out = read(f"{layer}mlp.experts.down_proj").transpose(1, 2).contiguous()
        else:
            out = read(f"{layer}mlp.experts.gate_up_proj").chunk(2, dim=1)[which == "up"].contiguous()
        return out.view(-1, self.d_model)


def split(name: str) -> tuple[str, str]:
    """``model.layers.N.``, or nothing, and the rest of one of OLMo-core's names."""
    if not name.startswith("blocks."):
        return "", name
    _, i, part = name.split(".", 2)
    return f"model.layers.{i}.", part


def expert(layer: str, e: int, which: str) -> str:
    """The published name of a part (gate, up or down) of one expert."""
    return f"{layer}mlp.experts.{e}.{which}_proj.weight"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: a NaN equals itself, and 0 is not -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))
