"""Inputs for attention tests, and attention itself as plain NumPy, one query at a time."""

from dataclasses import dataclass

import numpy as np
import torch

from spattn_olmoe.patterns import Pattern, available_variants, find_variant

OPTIONS = {"bigbird_seeded": {"block_size": 9}, "reformer_lsh": {"n_hashes": 2, "bucket_size": 12}}
"""Options that make a mask worth testing at the lengths of :data:`CASES`."""

CONTENT = [name for name in available_variants() if find_variant(name).build(4, 32).follows_content]
"""Masks that follow the content: there is no dense mask without queries and keys."""

MASKS = [name for name in available_variants() if name not in CONTENT]
"""All others, those of types that were added to the package among them."""


@dataclass(frozen=True)
class EveryOther(Pattern):
    """Odd distances only: no intervals, and the first query of every document has no key."""

    def allows(self, h, q_idx, kv_idx):
        return ((q_idx - kv_idx) % 2 == 1) & (h >= 0)


@dataclass(frozen=True)
class TwoFarIntervals(Pattern):
    """Two intervals, neither of which holds distance 0, and different in each head; the last head has none."""

    def allows(self, h, q_idx, kv_idx):
        d = q_idx - kv_idx
        return (((3 + h <= d) & (d < 9 + h)) | ((40 <= d) & (d < 41 + 30 * h))) & (h < self.n_heads - 1)

    def head_intervals(self, h):
        return [] if h == self.n_heads - 1 else [(3 + h, 9 + h), (40, 41 + 30 * h)]


OWN = {"every_other": EveryOther, "two_far_intervals": TwoFarIntervals}


def build(mask: str, H: int, N: int, **options) -> Pattern:
    if mask in OWN:
        return OWN[mask](n_heads=H, band_length=N, **options)
    return find_variant(mask).build(H, N, **OPTIONS.get(mask, {}), **options)


@dataclass(frozen=True)
class Case:
    """One call of attention: ``N`` band length, ``H`` heads of the pattern, of which ``local`` from ``offset`` on."""

    T: int
    N: int
    H: int = 4
    G: int = 4
    B: int = 2
    D: int = 8
    docs: tuple[int, ...] | None = None
    offset: int = 0
    local: int | None = None
    scale: float | None = None

    @property
    def cu_doc_lens(self) -> torch.Tensor | None:
        if self.docs is None:
            return None
        assert sum(self.docs) == self.B * self.T
        return torch.tensor((0, *np.cumsum(self.docs)), dtype=torch.int32)

    def __str__(self) -> str:
        given = {"docs": self.docs and "+".join(map(str, self.docs)), "scale": self.scale}
        parts = [f"T{self.T} N{self.N} H{self.H} G{self.G} B{self.B}", *(f"{k}={v}" for k, v in given.items() if v)]
        return " ".join(parts + ([f"heads {self.offset}+{self.local}"] if self.local else []))


CASES = [
    Case(T=1, N=8),
    Case(T=7, N=7, H=7, G=1),
    Case(T=33, N=64),  # T < N: heads whose band is never reached
    Case(T=128, N=128, G=2),
    Case(T=129, N=129, scale=0.37),  # one query in the second chunk; bands of uneven width
    Case(T=200, N=61, G=2, B=1),  # T > N: distances that no band holds
    Case(T=260, N=260, H=3, G=3, B=1),
    Case(T=300, N=256, H=6, G=3, offset=2, local=3, B=1),  # a rank of tensor parallelism: heads 2, 3, 4, one group
    Case(T=150, N=150, H=4, G=4, docs=(150, 1, 2, 100, 47)),  # as documents end with rows
    Case(T=90, N=90, H=4, G=2, docs=(30, 75, 0, 5, 70)),  # a document over the end of a row; an empty one
    Case(T=140, N=300, H=5, G=1, B=3, docs=(420,), scale=2.0),
    Case(T=160, N=96, H=6, G=6, offset=3, local=2, docs=(20, 130, 100, 70)),
]


def inputs(case: Case, dtype=torch.float64, requires_grad=True, seed=0):
    """Random q, k, v and weights of a loss. With grouped heads, ``G`` counts the groups of all ``H`` heads."""
    generator = torch.Generator().manual_seed(seed + case.T)
    H = case.local or case.H
    G = case.G if case.local is None else max(1, case.G * case.local // case.H)
    shapes = [(case.B, case.T, heads, case.D) for heads in (H, G, G, H)]
    q, k, v, w = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return *(x.requires_grad_(requires_grad) for x in (q, k, v)), w


def numpy_attention(q, k, v, allowed, case: Case):
    """Attention as the textbook has it. ``allowed[h][i][j]`` for global heads; documents from ``case.docs``."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    B, T, H, D = q.shape
    document = np.arange(B * T) * 0 if case.docs is None else np.repeat(np.arange(len(case.docs)), case.docs)
    document = document.reshape(B, T)
    scale = 1 / np.sqrt(D) if case.scale is None else case.scale
    out = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[2])
            for i in range(T):
                keys = [j for j in range(T) if allowed[case.offset + h][i][j] and document[b, i] == document[b, j]]
                if keys:
                    scores = k[b, keys, g] @ q[b, i, h] * scale
                    weights = np.exp(scores - scores.max())
                    out[b, i, h] = weights / weights.sum() @ v[b, keys, g]
    return torch.from_numpy(out)


def dead_rows(pattern: Pattern, case: Case) -> torch.Tensor:
    """Queries without any key, bool ``(B, T, local heads)``, from the mask and the documents."""
    mask = pattern.dense_mask(case.T)[case.offset :][: case.local or case.H][None]
    if case.docs is not None:
        document = torch.repeat_interleave(torch.arange(len(case.docs)), torch.tensor(case.docs)).view(case.B, case.T)
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return ~mask.any(-1).expand(case.B, -1, -1).transpose(1, 2)
