"""Pictures of masks, drawn from the pattern itself: what is drawn is what is computed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..patterns import VARIANTS, Pattern, causal_pairs, variant_of
from ..patterns.base import MaskMod
from .figures import save_figure

PIXELS = 288
"""Side of a drawn mask. Masks of fewer tokens are drawn at a pixel a token."""

_DPI = 144
_HEAD_DIM = 64  # of random content, where a mask follows the content
_MASK_CELLS = 2**22  # cells of a mask held at a time where there is no closed form

_ALLOWED, _NOT_ALLOWED, _FUTURE = ([c / 255 for c in rgb] for rgb in ((27, 79, 156), (238, 243, 250), (255, 255, 255)))
_FRAME, _INK, _PALE = "#9aa5b1", "#1f2933", "#52606d"


class Panel(NamedTuple):
    """One mask of a picture: one head of a pattern, and what stands above it."""

    pattern: Pattern
    head: int
    title: str


# ---- what a pixel shows ------------------------------------------------------------------------------------------


def allowed_share(pattern: Pattern, head: int, T: int, pixels: int = PIXELS) -> np.ndarray:
    """The share of allowed pairs in every pixel of one head's mask, float ``(P, P)`` with ``P = min(pixels, T)``.

    Exact at any length. A closed form for patterns with intervals; else O(T^2) time and O(T) memory.
    """
    edges = _edges(T, pixels)
    table = pattern.at_length(T).table
    if table is None:
        pairs = _count_cells(pattern.at_length(T), head, edges)
    else:
        pairs = sum(_pairs_at_least(edges, lo) - _pairs_at_least(edges, hi) for lo, hi in table[head])
    return pairs / _area(edges)


def causal_share(T: int, pixels: int = PIXELS) -> np.ndarray:
    """The share of pairs in every pixel whose key is not later than its query, float ``(P, P)``."""
    edges = _edges(T, pixels)
    return _pairs_at_least(edges, 0) / _area(edges)


def _edges(T: int, pixels: int) -> np.ndarray:
    """The first token of every pixel, and T; pixels differ by at most one token."""
    P = min(pixels, T)
    return np.arange(P + 1, dtype=np.int64) * T // P


def _area(edges: np.ndarray) -> np.ndarray:
    size = np.diff(edges)
    return size[:, None] * size[None, :]


def _pairs_at_least(edges: np.ndarray, distance: int) -> np.ndarray:
    """Pairs of every pixel whose distance is at least ``distance >= 0``."""
    # Key j < C has R - distance - j such queries before R: a sum that shrinks by one from key to key.
    queries = np.maximum(edges - distance, 0)[:, None]
    keys = np.minimum(edges[None, :], queries)
    before = keys * queries - keys * (keys - 1) // 2
    return np.diff(np.diff(before, axis=0), axis=1)


@functools.lru_cache(maxsize=4)
def drawn_mask(pattern: Pattern, T: int) -> MaskMod:
    """The mask to draw; of a pattern that follows the content, for queries and keys that are drawn at random once."""
    if not pattern.follows_content:
        return pattern.mask_mod
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, T, pattern.n_heads, _HEAD_DIM, generator=generator) for _ in range(2))
    return pattern.bind(q, k).mask_mod


def _count_cells(pattern: Pattern, head: int, edges: np.ndarray) -> np.ndarray:
    """Allowed pairs of every pixel, by looking at all of them, a few rows at a time."""
    T = int(edges[-1])
    mask_mod = drawn_mask(pattern, T)
    h, j = torch.tensor([[head]]), torch.arange(T)[None, :]
    pairs = np.zeros((len(edges) - 1, len(edges) - 1), dtype=np.int64)
    step = max(1, _MASK_CELLS // T)
    for row, (first, last) in enumerate(itertools.pairwise(edges)):
        for start in range(first, last, step):
            i = torch.arange(start, min(start + step, last))[:, None]
            mask = mask_mod(torch.zeros_like(h), h, i, j).expand(len(i), T)
            pairs[row] += np.add.reduceat(mask.sum(0).numpy(), edges[:-1])
    return pairs


# ---- words about a mask ------------------------------------------------------------------------------------------


def distances(pattern: Pattern, head: int, T: int) -> str:
    """The distances that a head attends within T tokens, ``d = 128-255``; without intervals, its share of pairs."""
    table = pattern.at_length(T).table
    if table is None:
        pairs = round(float((allowed_share(pattern, head, T, pixels=1) * T * T).item()))
        return f"{_percent(pairs, causal_pairs(T))} of causal pairs"
    spans = [(lo, min(hi, T) - 1) for lo, hi in table[head] if lo < min(hi, T)]
    return "d = " + ", ".join(f"{lo}-{hi}" if hi > lo else f"{lo}" for lo, hi in spans) if spans else "no key"


def cost(pattern: Pattern, T: int) -> str:
    """All heads' pairs as a share of dense causal attention."""
    share = f"{_percent(pattern.attended_pairs(T), pattern.n_heads * causal_pairs(T))} of dense attention"
    return f"about {share} (random queries and keys)" if pattern.follows_content else share


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if part < whole else "100 %"


# ---- pictures ----------------------------------------------------------------------------------------------------


def draw(pattern: Pattern, T: int | None = None) -> Figure:
    """All heads of a pattern side by side, for an input of T tokens (default: the band length)."""
    T = pattern.band_length if T is None else T
    H = pattern.n_heads
    options = ", ".join(f"{k}={str(value).lower()}" for k, value in pattern.options.items() if value is not None)
    shape = f"H = {H}, N = {pattern.at_length(T).band_length}" + (f", T = {T}" if T != pattern.band_length else "")
    columns = H if H < 4 else 4 if H <= 8 else 8
    panels = [Panel(pattern, h, f"Head {h}\n{distances(pattern, h, T)}") for h in range(H)]
    return _grid(
        [panels[n : n + columns] for n in range(0, H, columns)],
        T,
        variant_of(pattern.name, pattern.options).title,
        f"{shape}, {options}: {cost(pattern, T)}",
    )


def draw_layers(layers: Sequence[Pattern], T: int | None = None) -> Figure:
    """All heads of a model: as :func:`draw` where its layers are alike, else rows for each kind of layer.

    :param layers: the pattern of every layer.
    """
    T = layers[0].band_length if T is None else T
    kinds: dict[Pattern, list[int]] = {}
    for layer, pattern in enumerate(layers):
        kinds.setdefault(pattern, []).append(layer)
    if len(kinds) == 1:
        return draw(layers[0], T)
    rows: list[list[Panel]] = []
    labels = []
    for pattern, where in kinds.items():
        name = f"{pattern.name}\nlayers {', '.join(map(str, where))}\n{cost(pattern, T)}".replace(
            " of dense", "\nof dense"
        )
        for first in range(0, pattern.n_heads, 8):
            heads = range(first, min(first + 8, pattern.n_heads))
            rows.append([Panel(pattern, h, "" if rows else f"Head {h}") for h in heads])
            labels.append(f"heads {first} to {heads[-1]}" if first else name)
    return _grid(rows, T, "What each layer attends", f"{len(layers)} layers, T = {T}", labels, panel=0.875)


def figure_1() -> Figure:
    """Figure 1 of arXiv 2511.09596: the bands of Eq. 4 in every head, N = 1024, H = 8."""
    return draw(VARIANTS["exclusive"].build(n_heads=8, band_length=1024))


def figure_2() -> Figure:
    """Figure 2 of arXiv 2511.09596: one head of each ablation, N = 1024, H = 8."""
    N, head = 1024, 3
    labels = {"sliding_window": "(a) Sliding window", "eball": "(b) EBALL", "gbhalf": "(c) GBHALF"}
    row = []
    for name, label in labels.items():
        pattern = VARIANTS[name].build(n_heads=8, band_length=N)
        row.append(Panel(pattern, head, f"{label}, head {head}\n{distances(pattern, head, N)}"))
    return _grid([row], N, "The ablations", f"H = 8, N = {N}, each drawn at head {head}")


def overview(n_heads: int = 8, band_length: int = 1024, heads: Sequence[int] = (0, 1, 2, 3, 5, 7)) -> Figure:
    """The named masks of this package, one row each, a few heads."""
    rows: list[list[Panel]] = []
    labels = []
    for variant in VARIANTS.values():
        pattern = variant.build(n_heads, band_length)
        rows.append([Panel(pattern, h, f"Head {h}" if not rows else "") for h in heads])
        labels.append(
            f"{variant.name}\n\n{cost(pattern, band_length)}".replace(" of dense", "\nof dense").replace(" (", "\n(")
        )
    shape = f"H = {n_heads}, N = {band_length}, heads {', '.join(map(str, heads))}"
    return _grid(rows, band_length, "What each mask attends", shape, labels, panel=0.875)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture; its folder is made."""
    return save_figure(figure, path, dpi=_DPI)


def _grid(
    rows: Sequence[Sequence[Panel]],
    T: int,
    title: str,
    subtitle: str,
    labels: Sequence[str] = (),
    panel: float = PIXELS / _DPI,
) -> Figure:
    """Panels of ``panel`` inches in rows, titles above, and labels to the left where there are any.

    All lengths are inches and multiples of an eighth, so that panels begin on a pixel and are not resampled.
    """
    gap, margin, top, foot = 0.125, 0.125, 0.625, 0.375
    left = margin + (1.5 if labels else 0.25)
    above = 0.0 if labels else 0.5  # with labels only the first row has titles
    first = 0.25 if labels else 0.0
    columns = max(len(row) for row in rows)
    width = max(left + columns * (panel + gap) - gap + margin, 6.5)
    height = top + first + len(rows) * (above + panel + gap) - gap + foot
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, text: str, **style) -> None:
        figure.text(x / width, y / height, text, va="center", **{"ha": "center", "color": _INK, **style})

    write(width / 2, height - 0.21, title, fontsize=11, fontweight="bold")
    write(width / 2, height - 0.46, subtitle, fontsize=9)
    pixels = round(panel * _DPI)
    for n, row in enumerate(rows):
        bottom = height - top - first - (n + 1) * (above + panel) - n * gap
        for m, item in enumerate(row):
            box = ((left + m * (panel + gap)) / width, bottom / height, panel / width, panel / height)
            _show(figure.add_axes(box), item, T, pixels)
        middle = bottom + panel / 2
        if labels:
            write(left - 0.125, middle, labels[n], ha="right", fontsize=8.5)
        else:
            write(left - 0.125, middle, "query", rotation=90, fontsize=8, color=_PALE)
    note = (
        "Rows are queries, columns keys. Blue: attended; lighter blue: partly; palest: not attended; white: the future."
    )
    write(width / 2, 0.17, note, fontsize=8, color=_PALE)
    return figure


def _show(axes: Axes, panel: Panel, T: int, pixels: int) -> None:
    allowed = allowed_share(panel.pattern, panel.head, T, pixels)[..., None]
    causal = causal_share(T, pixels)[..., None]
    image = allowed * _ALLOWED + (causal - allowed) * _NOT_ALLOWED + (1 - causal) * _FUTURE
    axes.imshow(image.clip(0, 1), interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_FRAME)
        spine.set_linewidth(0.6)
    axes.set_title(panel.title, fontsize=8.5, color=_INK, pad=4)
