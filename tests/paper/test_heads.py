"""Statistics of heads against plain loops in float64 and scipy's entropies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine, jensenshannon
from scipy.stats import entropy
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tiny import HEADS, LAYERS, VOCAB, tiny
from spattn_olmoe import build_pattern
from spattn_olmoe.kernels import reference
from spattn_olmoe.kernels.call import Call
from spattn_olmoe.model.remedies import apply_remedies
from spattn_olmoe.paper import heads
from spattn_olmoe.paper.heads import DIVERSITIES, LayerHeads, measure_heads, summary
from spattn_olmoe.patterns import VARIANTS


def dense(q: torch.Tensor, k: torch.Tensor, pattern, scale: float) -> np.ndarray:
    """All attention weights ``(B, H, T, T)``, one row at a time; zeros where a row has no key."""
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    mask = reference.visible(Call(q, k, k, pattern.at_length(T), None, 1.0, 0)).expand(B, H, T, T).numpy()
    weights = np.zeros((B, H, T, T))
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        keys = np.flatnonzero(mask[b, h, i])
        if len(keys):
            scores = scale * (k[b, keys, h // group].double() @ q[b, i, h].double()).numpy()
            weights[b, h, i, keys] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return weights


def expected(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    B, H, T, _ = weights.shape
    rows = {h: [(b, i) for b in range(B) for i in range(T) if weights[b, h, i].sum() > 0] for h in range(H)}

    def mean(h, value):
        return np.mean([value(weights[b, h, i], i) for b, i in rows[h]]) if rows[h] else math.nan

    entropies = np.array([mean(h, lambda p, i: entropy(p)) for h in range(H)])
    distances = np.array([mean(h, lambda p, i: sum(p[j] * (i - j) for j in range(i + 1))) for h in range(H)])
    pairs = [(a, b, sorted(set(rows[a]) & set(rows[b]))) for a, b in itertools.combinations(range(H), 2)]
    between = [
        [
            np.mean([f(weights[b, x, i], weights[b, y, i]) for b, i in common])
            for f in (cosine, lambda p, q: jensenshannon(p, q) ** 2)
        ]
        for x, y, common in pairs
        if common
    ]
    causal = np.tril(np.ones((T, T), dtype=bool))
    return (
        entropies,
        distances,
        {
            "entropy_std": np.nanstd(entropies),
            "weight_std": weights.std(axis=1)[:, causal].mean(),
            "cosine_distance": np.mean([x for x, _ in between]),
            "js_divergence": np.mean([x for _, x in between]),
            "distance_std": np.nanstd(distances) / T,
        },
    )


@pytest.mark.parametrize(
    ("name", "options", "T"),
    [
        ("dense", {}, 13),
        ("exclusive", {}, 16),
        ("sharing", {}, 17),
        ("gbhalf", {}, 9),  # shorter than in training: heads without any key
        ("bigbird", {}, 14),
        ("eball", {"follows_input": True}, 11),
        ("reformer_lsh", {"bucket_size": 4, "n_hashes": 1}, 15),  # a mask of its own in every row of a batch
    ],
)
def test_statistics_are_those_of_all_weights(name, options, T, monkeypatch):
    monkeypatch.setattr(heads, "CHUNK_CELLS", 200)  # several chunks, the last one shorter
    pattern = VARIANTS[name].build(4, 16, **options)
    generator = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(2, T, 4, 8, generator=generator)
    k = torch.randn(2, T, 2, 8, generator=generator)
    found = LayerHeads(pattern.at_length(T))
    if pattern.follows_content:
        found.add(q, k, scale=0.3)
    else:
        for b in range(2):
            found.add(q[b : b + 1], k[b : b + 1], scale=0.3)
    entropies, distances, diversity = expected(dense(q, k, pattern, 0.3))
    np.testing.assert_allclose(found.entropy, entropies, rtol=1e-9)
    np.testing.assert_allclose(found.distance, distances, rtol=1e-9)
    assert found.diversity() == pytest.approx(diversity, rel=1e-8)
    assert list(diversity) == list(DIVERSITIES)


@settings(max_examples=25, deadline=None)
@given(H=st.integers(1, 5), T=st.integers(1, 40), cells=st.integers(1, 4000))
def test_uniform_attention_has_the_entropy_of_the_number_of_keys(H, T, cells):
    pattern = build_pattern("spattention", n_heads=H, band_length=max(H, T), local_sharing=True)
    found = LayerHeads(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "CHUNK_CELLS", cells)
        found.add(torch.zeros(1, T, H, 2), torch.randn(1, T, H, 2))
    keys = pattern.dense_mask(T).sum(-1).double().numpy()
    np.testing.assert_allclose(found.entropy, np.log(keys).mean(1), atol=1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_matrix_of_all_pairs_is_held(monkeypatch):
    T, H = 1024, 2
    monkeypatch.setattr(heads, "CHUNK_CELLS", 16 * H * T)
    q = torch.randn(1, T, H, 4)
    with Largest() as largest:
        LayerHeads(build_pattern("spattention", H, T)).add(q, q)
    assert largest.numel <= 16 * H * T < T * T


def test_a_model_is_measured_layer_by_layer():
    apply_remedies()
    config = tiny("attention.type=spattention")
    model = config.model_with_attention().build(init_device="cpu")
    model.init_weights(max_seq_len=32, device=torch.device("cpu"))
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (4, 32), generator=generator)
    whole = summary(measure_heads(model, [ids]))
    halves = summary(measure_heads(model, ids.split(2)))
    assert len(whole["layers"]) == LAYERS and len(whole["layers"][0]["entropy"]) == HEADS
    assert halves["entropy"] == pytest.approx(whole["entropy"], rel=1e-6)
    assert halves["diversity"] == pytest.approx(whole["diversity"], rel=1e-5)
    assert whole["layers"][0]["entropy"] != pytest.approx(whole["layers"][1]["entropy"], rel=1e-3)
    for block in model.blocks.values():
        torch.nn.init.zeros_(block.attention.w_q.weight)  # scores of zero: uniform over the mask
    keys = build_pattern("spattention", HEADS, 32, local_sharing=True).dense_mask().sum(-1).double()
    uniform = summary(measure_heads(model, [ids]))
    assert uniform["entropy"] == pytest.approx(float(keys.log().mean()), abs=1e-6)
    with pytest.raises(ValueError, match="no layer with an attention pattern"):
        measure_heads(torch.nn.Linear(2, 2), [ids])


def test_what_does_not_fit_is_refused():
    found = LayerHeads(build_pattern("standard", 2, 8))
    with pytest.raises(ValueError, match="q has 3 heads"):
        found.add(torch.zeros(1, 8, 3, 4), torch.zeros(1, 8, 3, 4))
    found.add(torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2, 4))
    with pytest.raises(ValueError, match="an input of 7 tokens after one of 8"):
        found.add(torch.zeros(1, 7, 2, 4), torch.zeros(1, 7, 2, 4))
