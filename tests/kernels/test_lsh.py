"""Reformer's own attention: buckets of queries and keys, against the paper's rules on one pair at a time."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from attention_cases import Case, build, inputs, numpy_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from spattn_olmoe import attention, build_pattern
from spattn_olmoe.kernels import Facts, cached_attention, flex
from spattn_olmoe.kernels.dispatch import unsuitable
from spattn_olmoe.patterns import lsh


def lsh_pattern(H=4, N=48, **options):
    return build_pattern("reformer", n_heads=H, band_length=N, buckets="lsh", **options)


def buckets_of(pattern, x, h):
    """The bucket of one vector in every round: the largest of the projections and their opposites."""
    generator = torch.Generator().manual_seed(pattern.seed)
    found = []
    for _ in range(pattern.n_hashes):
        rotation = torch.randn(pattern.n_heads, len(x), pattern.n_buckets // 2, generator=generator)[h]
        projections = (x.double() @ rotation.double()).tolist()
        found.append(max(range(pattern.n_buckets), key=(projections + [-p for p in projections]).__getitem__))
    return found


def textbook(pattern, q, k, offset=0, documents=None):
    """``[b][h][i]`` -> the keys that a query attends by the paper's rules."""
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    rows = []
    for b in range(B):
        rows.append([])
        for h in range(H):
            queries = [buckets_of(pattern, q[b, i, h], offset + h) for i in range(T)]
            keys = [buckets_of(pattern, k[b, j, h // group], offset + h) for j in range(T)]
            rows[b].append([])
            for i in range(T):
                earlier = [j for j in range(i) if documents is None or documents[b][j] == documents[b][i]]
                met = {j for j in earlier if any(a == c for a, c in zip(queries[i], keys[j], strict=True))}
                rows[b][h].append(met or {i})
    return rows


@pytest.mark.parametrize("case", [Case(T=24, N=48), Case(T=21, N=30, H=6, G=3, offset=2, local=2)], ids=str)
@pytest.mark.parametrize("n_hashes", [1, 3])
def test_the_reference_attends_by_the_papers_rules(case, n_hashes):
    pattern = lsh_pattern(case.H, case.N, n_hashes=n_hashes)
    q, k, v, _ = inputs(case, requires_grad=False)
    out = attention(q, k, v, pattern, "reference", head_offset=case.offset)
    keys = textbook(pattern, q, k, case.offset)
    own_keys = sum(met == {i} for row in keys for head in row for i, met in enumerate(head))
    assert own_keys > case.B * q.shape[2], "no query but the first has itself alone: the rule is not tried"
    for b in range(case.B):
        allowed = [[[j in met for j in range(case.T)] for met in head] for head in keys[b]]
        one = Case(T=case.T, N=case.N)
        expected = numpy_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], allowed, one)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-10, atol=1e-11)


def test_in_documents_a_query_is_alone_that_has_no_key_in_its_own():
    case = Case(T=20, N=40, docs=(7, 20, 13))
    pattern = lsh_pattern(case.H, case.N, n_hashes=1)
    q, k, v, _ = inputs(case, requires_grad=False)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(case.docs)).view(2, 20)
    keys = textbook(pattern, q, k, documents=documents.tolist())
    out = attention(q, k, v, pattern, "reference", case.cu_doc_lens)
    for b in range(2):
        allowed = [[[j in met for j in range(case.T)] for met in head] for head in keys[b]]
        expected = numpy_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], allowed, Case(T=20, N=40))
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-10, atol=1e-11)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_properties_of_the_mask(data):
    """Causal; a key for every query; itself only if nothing else; later tokens change nothing; more rounds, more keys."""
    H, T = data.draw(st.integers(1, 3), "H"), data.draw(st.integers(1, 60), "T")
    N, seed = data.draw(st.integers(H, 80), "N"), data.draw(st.integers(0, 5), "seed")
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, T, H, 6, generator=generator) for _ in range(2))
    masks = [mask_of(lsh_pattern(H, N, n_hashes=n, seed=seed), q, k) for n in (1, 2)]
    for mask in masks:
        assert not mask.triu(1).any()
        assert mask.any(-1).all()
        itself = mask.diagonal(dim1=-2, dim2=-1)
        assert (mask.tril(-1).any(-1) != itself).all()
    assert not (masks[0].tril(-1) & ~masks[1]).any()
    stop = data.draw(st.integers(1, T), "stop")
    shorter = mask_of(lsh_pattern(H, N, n_hashes=1, seed=seed), q[:, :stop], k[:, :stop])
    assert torch.equal(shorter, masks[0][..., :stop, :stop])


def mask_of(pattern, q, k):
    B, T, H, _ = q.shape
    b, h, i = torch.arange(B)[:, None, None, None], torch.arange(H)[:, None, None], torch.arange(T)
    return pattern.bind(q, k).mask_mod(b, h, i[:, None], i)


def test_pairs_are_what_is_expected_of_random_content():
    pattern = lsh_pattern(8, 256)
    q, k = (torch.randn(8, 256, 8, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = mask_of(pattern, q, k).sum().item() / 8
    assert pattern.attended_pairs() == pytest.approx(found, rel=0.02)
    assert pattern.dead_rows() == 0
    assert lsh_pattern(2, 64, n_hashes=1).attended_pairs(1) == 2  # itself


def test_blocks_hold_every_pair():
    case = Case(T=300, N=300, B=2, H=3, G=3, D=16, docs=(120, 210, 270))
    pattern = lsh_pattern(3, 300, n_hashes=1, bucket_size=4)
    q, k, _, _ = inputs(case, requires_grad=False)
    mask = mask_of(pattern, q, k)
    blocks = pattern.bind(q, k).blocks(16)
    padded = torch.nn.functional.pad(mask, (0, 4, 0, 4)).unflatten(3, (19, 16)).unflatten(2, (19, 16))
    held = padded.transpose(3, 4).flatten(-2).any(-1)
    assert not (held & ~blocks).any()
    assert blocks.sum() < torch.ones_like(blocks).tril().sum()  # and not every block that causality leaves


def test_nothing_is_kept_from_one_batch_to_the_next_and_nothing_compiled_again():
    pattern = lsh_pattern(2, 256, n_hashes=2)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()  # traces as for a GPU, and runs what it traced as it is
    compiled = torch.compile(flex_attention, dynamic=False, backend=counter)
    for seed in range(3):
        case = Case(T=256, N=256, H=2, G=2, B=1, D=16)
        q, k, v, _ = inputs(case, torch.float32, requires_grad=False, seed=seed)
        mask = flex.mask_of_call(pattern, q, k)
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
        torch.testing.assert_close(out, attention(q, k, v, pattern, "reference"), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_rotations_are_of_global_heads_and_seeds():
    x = torch.randn(1, 50, 4, 16)
    hashing = lsh.Hash(2, 8, 4, 0)
    of_all = hashing.buckets(x, range(4))
    assert torch.equal(of_all[:, :, 2:], hashing.buckets(x[:, :, 2:], (2, 3)))
    assert not torch.equal(of_all, hashing._replace(seed=1).buckets(x, range(4)))
    assert 0 <= of_all.min() and of_all.max() == 7
    assert torch.equal(of_all, hashing.buckets(3 * x, range(4)))  # directions are hashed, not lengths


def test_rotations_follow_the_order_of_heads():
    order, natural = (2, 0, 3, 1), lsh_pattern(4, 64, n_hashes=2)
    q, k, v, _ = inputs(Case(T=64, N=64, H=4, G=4, D=16), torch.float32, requires_grad=False)
    moved = attention(*(x[:, :, order] for x in (q, k, v)), replace(natural, head_order=order), "reference")
    assert torch.equal(moved, attention(q, k, v, natural, "reference")[:, :, order])


def test_a_cache_that_knows_where_every_sequence_is():
    case = Case(T=30, N=40, B=2, G=2)
    pattern = build("reformer_lsh", 4, 40)
    q, k, v, _ = inputs(case, requires_grad=False)
    expected = attention(q, k, v, pattern, "reference")
    at = torch.tensor([29, 17])
    last = torch.stack([q[b, i] for b, i in enumerate(at.tolist())])[:, None]
    got = cached_attention(last, k, v, pattern, start=at)
    for b, i in enumerate(at.tolist()):
        torch.testing.assert_close(got[b, 0], expected[b, i], rtol=1e-10, atol=1e-11)


def test_there_is_no_mask_without_content():
    pattern = lsh_pattern()
    for ask in (pattern.dense_mask, lambda: pattern.mask_mod, lambda: pattern.mask_rows(0, 1, 4)):
        with pytest.raises(ValueError, match=r"depends on queries and keys, use bind\(q, k\)"):
            ask()
    assert pattern.intervals is None
    assert "not made of" in unsuitable("triton", Facts("cuda", pattern, 48))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("reformer", {"buckets": "lhs"}, "attention.buckets='lhs': must be 'position' or 'lsh'"),
        ("reformer", {"n_hashes": 8}, "attention.n_hashes=8 is read only with attention.buckets=lsh"),
        ("reformer", {"buckets": "lsh", "n_hashes": 0}, "attention.n_hashes=0: must be a whole number of at least 1"),
        ("reformer", {"buckets": "lsh", "n_hashes": 65}, "of at least 1 and at most 64"),
        ("reformer", {"buckets": "lsh", "bucket_size": 1.5}, "attention.bucket_size=1.5: must be a whole number"),
        ("reformer", {"buckets": "lsh", "seed": -1}, "attention.seed=-1: must be a whole number of at least 0"),
        ("bigbird", {"random_links": "yes"}, "attention.random_links='yes': must be 'stride' or 'seeded'"),
        ("bigbird", {"block_size": 16}, "attention.block_size=16 is read only with attention.random_links=seeded"),
        ("bigbird", {"random_links": "seeded", "seed": "a"}, "attention.seed='a': must be a whole number"),
    ],
)
def test_bad_options_are_one_line(name, options, said):
    with pytest.raises(ValueError) as caught:
        build_pattern(name, n_heads=4, band_length=64, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
