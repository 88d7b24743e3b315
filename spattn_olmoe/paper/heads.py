"""How heads attend: entropy, and how far the heads of a layer differ.

Section "Performance via Inductive Bias and Regularization" of arXiv 2511.09596 reports a head diversity sigma and a mean
attention entropy, and does not define sigma. :data:`DIVERSITIES` are its natural definitions. All are sums over queries, so
a few queries are looked at at a time and no ``T x T`` matrix is held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..model.mixer import PatternAttention
from ..patterns import Pattern
from ..text import figure_text

CHUNK_CELLS = 2**22
"""Attention weights held at a time, over batch, heads, queries and keys."""

DIVERSITIES = {
    "entropy_std": "standard deviation over heads of their mean entropy (nats)",
    "weight_std": "standard deviation over heads of the weight of a (query, key) pair, mean over causal pairs",
    "cosine_distance": "1 - cosine similarity of two heads' weights of a query, mean over pairs of heads and queries",
    "js_divergence": "Jensen-Shannon divergence (nats) of two heads' weights of a query, mean likewise",
    "distance_std": "standard deviation over heads of their mean attended distance, as a share of the input's length",
}
"""Definitions of head diversity. Standard deviations are the population's. A query counts for a head, or for a pair of
heads, where it has a key there; a weight that the mask leaves out is zero."""


@dataclass
class LayerHeads:
    """Sums over queries of one layer; :meth:`add` a batch at a time.

    :param pattern: what the heads attend.
    """

    pattern: Pattern
    length: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, q: Tensor, k: Tensor, scale: float | None = None) -> None:
        """Add a batch.

        :param q: ``(B, T, H, D)``, as attention gets them: after QK-norm and RoPE.
        :param k: ``(B, T, G, D)``; head ``h`` reads group ``h // (H / G)``.
        :raises ValueError: other heads than the pattern's, or another length than before.
        """
        B, T, H, D = q.shape
        if H != self.pattern.n_heads:
            raise ValueError(
                f"q has {H} heads but {self.pattern} has {self.pattern.n_heads}: give all heads of the model"
            )
        if self.length not in (0, T):
            raise ValueError(
                f"an input of {T} tokens after one of {self.length}: statistics are over inputs of one length"
            )
        self.length = T
        mask_mod = self.pattern.bind(q, k).mask_mod
        k = k.repeat_interleave(H // k.shape[2], dim=2)
        b = torch.arange(B if self.pattern.follows_content else 1, device=q.device)[:, None, None, None]
        h = torch.arange(H, device=q.device)[:, None, None]
        position = torch.arange(T, device=q.device)
        step = max(1, CHUNK_CELLS // (B * H * T))
        for start in range(0, T, step):
            stop = min(start + step, T)
            scores = torch.einsum("bqhd,bkhd->bhqk", q[:, start:stop].double(), k[:, :stop].double())
            allowed = mask_mod(b, h, position[start:stop, None], position[:stop]).expand(B, H, stop - start, stop)
            self._add_rows(scores * (D**-0.5 if scale is None else scale), allowed, start)

    def _add_rows(self, scores: Tensor, allowed: Tensor, start: int) -> None:
        """Queries from ``start`` on: scores and whether they are allowed, ``(B, H, Q, K)``."""
        B, H, Q, K = scores.shape
        live = allowed.any(-1)
        scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~live[..., None], 0.0)
        weights = scores.softmax(-1) * allowed
        distance = (torch.arange(start, start + Q)[:, None] - torch.arange(K)).to(
            scores
        )  # negative: not yet to be seen
        own = _entropy(weights)
        self._sum("live", live.sum((0, 2)).double())
        self._sum("entropy", own.sum((0, 2)))
        self._sum("distance", (weights * distance).sum((0, 2, 3)))
        self._sum("weight_std", weights.std(1, correction=0).sum())
        self._sum("pairs", (distance >= 0).sum().double() * B)
        norm = weights.norm(dim=-1)
        for a, b in itertools.combinations(range(H), 2):
            both = live[:, a] & live[:, b]
            dot = (weights[:, a] * weights[:, b]).sum(-1)
            cosine = (dot / (norm[:, a] * norm[:, b]).clamp(min=1e-300)) * both
            divergence = (_entropy((weights[:, a] + weights[:, b]) / 2) - (own[:, a] + own[:, b]) / 2) * both
            sums = torch.stack([both.sum().double(), cosine.sum(), divergence.sum()])
            self._sum(f"pair {a} {b}", sums)

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.cpu() if name in self._sums else value.cpu()

    @property
    def entropy(self) -> np.ndarray:
        """Mean entropy of each head's queries that have a key, nats, ``(H,)``; NaN for a head without any."""
        return (self._sums["entropy"] / self._sums["live"]).numpy()

    @property
    def distance(self) -> np.ndarray:
        """Mean attended distance of each head, tokens, ``(H,)``; NaN likewise."""
        return (self._sums["distance"] / self._sums["live"]).numpy()

    def diversity(self) -> dict[str, float]:
        """The layer's head diversity by each of :data:`DIVERSITIES`."""
        pairs = torch.stack(
            [value for name, value in self._sums.items() if name.startswith("pair ")] or [torch.zeros(3)]
        )
        counted, cosine, divergence = pairs[pairs[:, 0] > 0].T
        return {
            "entropy_std": float(np.nanstd(self.entropy)),
            "weight_std": float(self._sums["weight_std"] / self._sums["pairs"]),
            "cosine_distance": float((1 - cosine / counted).mean()),
            "js_divergence": float((divergence / counted).mean()),
            "distance_std": float(np.nanstd(self.distance / self.length)),
        }


def _entropy(weights: Tensor) -> Tensor:
    """Shannon entropy over the last dimension, nats; 0 of a row of zeros."""
    return torch.special.entr(weights).sum(-1)


@torch.no_grad()
def measure_heads(model: nn.Module, batches: Iterable[Tensor]) -> list[LayerHeads]:
    """Statistics of every attention layer of a model over inputs of one length.

    :param batches: token ids, int64 ``(B, T)`` each.
    :raises ValueError: the model has no layer with an attention pattern.
    """
    layers = [module for module in model.modules() if isinstance(module, PatternAttention)]
    if not layers:
        raise ValueError("the model has no layer with an attention pattern")
    found: list[LayerHeads] = []
    for ids in batches:
        found = found or [LayerHeads(layer.pattern.at_length(ids.shape[1])) for layer in layers]
        with _listening(layers, found):
            model(ids)
    if not found:
        raise ValueError("no text to measure heads on: give at least one batch")
    return found


@contextmanager
def _listening(layers: list[PatternAttention], found: list[LayerHeads]) -> Iterator[None]:
    """While the context lasts, every layer's queries and keys are added to its statistics."""

    def hook(statistics: LayerHeads):
        def add(backend: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("cu_doc_lens") is not None:
                raise ValueError("statistics of heads do not know documents: give text without cu_doc_lens")
            q, k, _ = args[0]
            statistics.add(q, k, backend.scale)

        return add

    handles = [
        layer.backend.register_forward_pre_hook(hook(statistics), with_kwargs=True)
        for layer, statistics in zip(layers, found, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def summary(layers: list[LayerHeads]) -> dict[str, Any]:
    """Mean entropy and each diversity, over layers, and what they are made of."""
    diversities = [layer.diversity() for layer in layers]
    return {
        "length": layers[0].length,
        "entropy": float(np.mean([np.nanmean(layer.entropy) for layer in layers])),
        "diversity": {name: float(np.mean([d[name] for d in diversities])) for name in DIVERSITIES},
        "layers": [
            {"entropy": _list(layer.entropy), "distance": _list(layer.distance), "diversity": diversity}
            for layer, diversity in zip(layers, diversities, strict=True)
        ],
    }


def _list(values: np.ndarray) -> list[float | None]:
    """Values as JSON can hold them: None for a head without any key."""
    return [None if np.isnan(x) else float(x) for x in values]


def heads_figure(summaries: dict[str, dict[str, Any]]) -> Figure:
    """Entropy and mean distance of every head of every layer, one row of panels for each model."""
    figure = Figure(figsize=(8.5, 2.1 * len(summaries) + 0.3), layout="constrained")
    panels = figure.subplots(len(summaries), 2, squeeze=False)
    for row, (name, found) in zip(panels, summaries.items(), strict=True):
        for axes, key, unit in zip(row, ("entropy", "distance"), ("nats", "tokens"), strict=True):
            values = np.array([layer[key] for layer in found["layers"]], dtype=float)
            image = axes.imshow(values, aspect="auto", cmap="viridis")
            axes.set(ylabel="layer", xlabel="head", xticks=range(values.shape[1]), yticks=range(len(values)))
            axes.set_title(
                f"{figure_text(name)}: mean {'entropy' if key == 'entropy' else 'attended distance'}", fontsize=9
            )
            figure.colorbar(image, ax=axes, label=unit)
    return figure
