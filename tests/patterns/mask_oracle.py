"""The masks of docs/masks.md that depend on positions alone, once more, as plain Python on one (head, query, key) at a time.

Written from the definitions and sharing no code with the package, so that a mistake in one is not a mistake in both.
"""

import functools

from spattn_olmoe.patterns import Pattern, available_variants, find_variant

OPTIONS = {"bigbird_seeded": {"seed": 7}}
"""Options that the oracle has besides a mask's own."""


def build(mask: str, n_heads: int, band_length: int, **options) -> Pattern:
    """The pattern that the oracle's mask of that name is."""
    return find_variant(mask).build(n_heads, band_length, **OPTIONS.get(mask, {}), **options)


MASKS = [name for name in available_variants() if not find_variant(name).build(4, 32).follows_content]
"""Every mask that is the same for all inputs, also that of a type which was added to the package and has no oracle."""

WITH_INTERVALS = [name for name in MASKS if build(name, 4, 32).intervals is not None]


def bands(H, N):
    """Distances 0..N-1 dealt to the heads in order; where N is not a multiple of H the first heads get one more."""
    widths = [N // H] * H
    for h in range(N % H):
        widths[h] += 1
    dealt, nearest = [], 0
    for width in widths:
        dealt.append(list(range(nearest, nearest + width)))
        nearest += width
    assert nearest == N
    return dealt


def _exclusive(H, N, h, i, j):
    return i - j in bands(H, N)[h]


def _sharing(H, N, h, i, j):
    own = bands(H, N)[h]
    return i - j in own or i - j <= len(own)


def _sliding_window(H, N, h, i, j):
    return i - j <= len(bands(H, N)[h])


def _gbhalf(H, N, h, i, j):
    own = bands(H, N)[h]
    return i - j in own[: len(own) // 2]


@functools.cache
def equal_area_bands(H, N, start):
    """Distances start..N-1 dealt to the heads: a band ends where the pairs up to there are nearest to the share due.

    By trying all ends, where the package takes a root. Of two ends that are equally near, the smaller.
    """
    pairs = [0]  # of the distances start..start+n-1, a distance d having N - d of them
    for d in range(start, N):
        pairs.append(pairs[-1] + N - d)
    ends = [min(range(len(pairs)), key=lambda n: abs(pairs[n] * H - pairs[-1] * h)) for h in range(H + 1)]
    return [set(range(start + ends[h], start + ends[h + 1])) for h in range(H)]


def _equal_area(H, N, h, i, j):
    return i - j in equal_area_bands(H, N, 0)[h]


def _equal_area_sharing(H, N, h, i, j):
    window = N // H
    return i - j <= window or i - j in equal_area_bands(H, N, window + 1)[h]


def _longformer(H, N, h, i, j):
    if N <= 4:
        return True
    w = max(1, min(256, N // 4))
    g = max(1, min(16, max(1, N // 32)))
    return i - j <= w or i < g or j < g


def _bigbird(H, N, h, i, j):
    if N <= 4:
        return True
    w = max(1, min(128, max(1, N // 8)))
    g = max(1, min(8, max(1, N // 64)))
    s = max(16, N // 32)
    d = i - j
    return d <= w or i < g or j < g or (d > w and d % s == 0)


def _hash(x):
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B % 2**32
    return x ^ x >> 16


@functools.cache
def _links(seed, h, block):
    """The random blocks of a block of queries: three of those from block 2 on that lie before its window of three."""
    candidates, chosen = max(block - 4, 0), set()
    state = _hash(_hash(_hash(seed) + h) + block)
    for n, last in enumerate(range(candidates - 3, candidates)):
        if last >= 0:
            link = _hash(state + n) % (last + 1)
            chosen.add(last if link in chosen else link)
    assert len(chosen) == min(candidates, 3)
    return {2 + link for link in chosen}


def _bigbird_seeded(H, N, h, i, j):
    b = max(1, min(64, N // 64))
    query, key = i // b, j // b
    return key in (0, 1, query, query - 1, query - 2) or key in _links(7, h, query)


def _reformer(H, N, h, i, j):
    if N <= 4:
        return True
    b = max(1, min(64, max(1, N // 8)))
    nb = max(2, N // b)
    near = max(1, min(8, N // 4))
    query, key = (3 * i + 13 * h + 7) % nb, (3 * j + 13 * h + 7) % nb
    neighbours = {query - 1, query, query + 1}
    if nb > 2:
        neighbours = {bucket % nb for bucket in neighbours}
    return key in neighbours or i - j <= near


_RULES = {
    "dense": lambda H, N, h, i, j: True,
    "exclusive": _exclusive,
    "sharing": _sharing,
    "sliding_window": _sliding_window,
    "eball": _exclusive,
    "gbhalf": _gbhalf,
    "equal_area": _equal_area,
    "equal_area_sharing": _equal_area_sharing,
    "exclusive_sinks": lambda H, N, h, i, j: j < 4 or _exclusive(H, N, h, i, j),
    "sharing_sinks": lambda H, N, h, i, j: j < 4 or _sharing(H, N, h, i, j),
    "longformer": _longformer,
    "bigbird": _bigbird,
    "bigbird_seeded": _bigbird_seeded,
    "reformer": _reformer,
}
DEFINED = tuple(_RULES)
"""The masks that have a definition here."""


def allowed(mask, H, N, h, i, j):
    """Whether query i may attend key j in head h, for one of :data:`DEFINED`."""
    return j <= i and _RULES[mask](H, N, h, i, j)


def allowed_keys(mask, H, N, T):
    """``[h][i]`` -> the set of keys, for every head and query of T tokens."""
    return [[{j for j in range(T) if allowed(mask, H, N, h, i, j)} for i in range(T)] for h in range(H)]
