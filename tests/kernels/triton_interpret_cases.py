"""The fused kernels on a CPU, in Triton's interpreter. ``test_triton_interpret.py`` runs this file in a process of its
own, because Triton decides at its import whether it interprets:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_interpret_cases.py
"""

import heapq
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shift_oracle import shifted_attention
from torch.utils.checkpoint import checkpoint

from spattn_olmoe import attention
from spattn_olmoe.kernels import cached_attention, reference
from spattn_olmoe.kernels import triton as banded
from spattn_olmoe.kernels.call import Call, Facts
from spattn_olmoe.kernels.dispatch import unsuitable
from spattn_olmoe.kernels.documents import document_bounds
from spattn_olmoe.kernels.triton import ops
from spattn_olmoe.kernels.triton import schedule as plan
from spattn_olmoe.kernels.triton import tile_sizes as configs
from spattn_olmoe.patterns import Pattern
from spattn_olmoe.patterns.variants import find_variant


@dataclass(frozen=True)
class Fixed(Pattern):
    """Any intervals, the same in every head but for a shift of ``step`` a head; the last head attends nothing."""

    spans: tuple = ((3, 40), (70, 71))
    step: int = 5

    def allows(self, h, q_idx, kv_idx):
        d = q_idx - kv_idx - h * self.step
        near, far = self.spans
        inside = ((near[0] <= d) & (d < near[1])) | ((far[0] <= d) & (d < far[1]))
        return inside & (h < self.n_heads - 1)

    def head_intervals(self, h):
        s = h * self.step
        return [] if h == self.n_heads - 1 else [(lo + s, hi + s) for lo, hi in self.spans]


def build(name, H, N):
    if name == "fixed":
        return Fixed(n_heads=H, band_length=N)
    return find_variant(name).build(H, N)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is full of NaN: what a kernel forgets to write shows."""
    torch.manual_seed(0)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def tensors(B, T, H, G, D, dtype=torch.float32, requires_grad=True):
    return [torch.randn(B, T, h, D, dtype=dtype, requires_grad=requires_grad) for h in (H, G, G)]


def with_gradients(call, xs, d_out):
    out = call(*xs)
    return out, *torch.autograd.grad(out, xs, d_out.to(out.dtype))


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (a.double() - e.double()).abs().max().item()
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"{name} is off by {error:.2e}"


#        pattern               B  T    H  G  D   N    documents                       offset heads scale  dtype
CASES = [
    ("dense",                   1, 130, 2, 2, 32, 130, None,                           0, None, None, torch.float32),
    ("exclusive",               1, 200, 8, 8, 32, 200, None,                           0, None, None, torch.float32),
    ("sharing",                 2, 150, 4, 2, 80, 150, None,                           0, None, None, torch.float32),
    ("sliding_window",         1, 100, 2, 1, 96, 100, None,                           0, None, None, torch.float32),
    ("gbhalf",                 1, 170, 4, 4, 32, 128, None,                           0, None, None, torch.float32),
    ("eball",                  2, 190, 4, 4, 48, 190, (50, 0, 120, 30, 180),          0, None, None, torch.float32),
    ("sharing",                 2, 130, 4, 1, 32, 64,  (130, 1, 2, 64, 63),            0, None, None, torch.float32),
    ("dense",                   1, 140, 2, 2, 32, 140, (5, 64, 71),                    0, None, None, torch.float32),
    ("fixed",                  1, 160, 4, 2, 32, 160, None,                           0, None, None, torch.float32),
    ("fixed",                  1, 160, 4, 2, 32, 160, (100, 60),                      0, None, None, torch.float32),
    ("eball",                  1, 128, 8, 2, 32, 128, None,                           4, 4,    None, torch.float32),
    ("sharing",                 1, 120, 4, 4, 32, 120, None,                           1, 2,    -0.4, torch.float32),
    ("exclusive",               1, 65,  4, 4, 16, 64,  None,                           0, None, 0.0,  torch.float32),
    ("sharing",                 1, 129, 4, 2, 64, 128, None,                           0, None, None, torch.float16),
    ("eball",                  1, 1,   4, 4, 32, 256, None,                           0, None, None, torch.float32),
    ("eball",                  1, 3,   8, 8, 33, 8,   None,                           0, None, None, torch.float32),
    ("exclusive",               1, 90,  2, 2, 160, 90, None,                           0, None, None, torch.float32),
    ("gbhalf",                 1, 60,  2, 1, 256, 60, None,                           0, None, None, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c if x is not None))
def test_agrees_with_the_reference(case):
    name, B, T, H, G, D, N, docs, offset, local, scale, dtype = case
    pattern = build(name, H, N)
    H = local or H
    xs = tensors(B, T, H, min(G, H), D, dtype)
    d_out = torch.randn(B, T, H, D, dtype=torch.float64)
    cu = None if docs is None else torch.tensor((0, *torch.tensor(docs).cumsum(0)), dtype=torch.int32)
    options = {"cu_doc_lens": cu, "scale": scale, "head_offset": offset}
    exact = [x.detach().double().requires_grad_() for x in xs]
    expected = with_gradients(lambda *x: attention(*x, pattern, impl="reference", **options), exact, d_out)
    actual = with_gradients(lambda *x: attention(*x, pattern, impl="triton", **options), xs, d_out)
    assert_close(actual, expected, 4e-3 if dtype == torch.float16 else 5e-6)
    dead = (expected[0] == 0).all(-1)
    assert (actual[0][dead] == 0).all()
    assert (actual[1][dead] == 0).all()


@pytest.mark.parametrize("name", ["exclusive", "sharing", "fixed"])
def test_agrees_with_the_shift_identity(name):
    pattern = build(name, 4, 150)
    xs = tensors(1, 150, 4, 2, 32)
    d_out = torch.randn(1, 150, 4, 32)
    exact = [x.detach().double() for x in xs]
    expected = shifted_attention(*exact, d_out.double(), pattern.table, 0.2)
    actual = with_gradients(lambda *x: attention(*x, pattern, impl="triton", scale=0.2), xs, d_out)
    assert_close(actual, expected, 5e-6)


@st.composite
def banded_calls(draw):
    """A length, the intervals of each head, heads a group, the cuts between documents (or None), and tiles."""
    T, group = draw(st.integers(1, 70)), draw(st.sampled_from([1, 2]))
    heads = []
    for _ in range(group * draw(st.integers(1, 2))):
        a, b, c, d = sorted(draw(st.lists(st.integers(0, T + 3), min_size=4, max_size=4)))
        pairs = [(lo, hi) for lo, hi in ((a, b), (c + 1, d + 1)) if lo < hi]
        heads.append((*pairs, (0, 0), (0, 0))[:2])
    cuts = draw(st.none() | st.lists(st.integers(0, T), max_size=4).map(sorted))
    sides = st.sampled_from([16, 32, 64])
    tiles = {name: {256: configs.Config(draw(sides), draw(sides), 4, 1)} for name in ("forward", "dq", "dkdv")}
    return T, tuple(heads), group, cuts, tiles


@settings(max_examples=15, deadline=None)
@given(banded_calls())
def test_any_intervals_documents_and_tiles_agree_with_softmax_under_a_mask(call):
    T, heads, group, cuts, tiles = call
    H, G = len(heads), len(heads) // group
    xs = tensors(1, T, H, G, 16)
    d_out = torch.randn(1, T, H, 16)
    d = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.stack([((a <= d) & (d < b)) | ((lo <= d) & (d < hi)) for (a, b), (lo, hi) in heads])
    bounds = None, None
    if cuts is not None:
        cu = torch.tensor([0, *cuts, T], dtype=torch.int32)
        bounds = banded.document_bounds(cu, 1, T)
        document = torch.searchsorted(cu, torch.arange(T), right=True)
        mask &= document[:, None] == document
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.SHIPPED["interpreter"], 4, tiles)
        flat = [bound for head in heads for pair in head for bound in pair]
        actual = with_gradients(lambda *x: ops.banded_forward(*x, flat, 0.25, *bounds)[0], xs, d_out)

    def masked(q, k, v):
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.25
        weights = torch.softmax(scores.masked_fill(~mask, -1e30), -1) * mask  # a row without keys: zeros
        return torch.einsum("bhts,bshd->bthd", weights, v)

    exact = [x.detach().double().requires_grad_() for x in xs]
    assert_close(actual, with_gradients(masked, exact, d_out), 5e-6)


def test_log_sum_exp_is_minus_infinity_where_a_row_has_no_key():
    pattern = build("eball", 4, 128)
    xs = tensors(1, 128, 4, 4, 32, requires_grad=False)
    out, lse = ops.banded_forward(*xs, banded.local_intervals(pattern, 0, 4), 32**-0.5, None, None)
    mask = pattern.dense_mask(128)
    scores = torch.einsum("bthd,bshd->bhts", *xs[:2]) * 32**-0.5
    expected = torch.logsumexp(scores.masked_fill(~mask, float("-inf")), -1) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(lse, expected, atol=1e-5, rtol=1e-5)
    assert (lse.isneginf() == ~mask.any(-1)).all()
    assert not out.isnan().any()


def test_gradients_are_the_same_bits_every_time():
    pattern = build("sharing", 4, 100)
    xs, d_out = tensors(1, 100, 4, 1, 32), torch.randn(1, 100, 4, 32)
    first, second = (with_gradients(lambda *x: attention(*x, pattern, impl="triton"), xs, d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reads_views_where_they_lie_and_copies_other_layouts():
    pattern = build("sharing", 2, 70)
    fused = torch.randn(2, 70, 3, 2, 32)
    views = [x.requires_grad_() for x in fused.detach().unbind(2)]
    turned = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in views]
    assert not views[0].is_contiguous() and turned[0].stride(-1) != 1
    expanded = torch.randn(1, 1, 1, 1).expand(2, 70, 2, 32)  # as the gradient of a sum is
    expected = with_gradients(lambda *x: attention(*x, pattern, impl="reference"), views, expanded)
    for xs in (views, turned):
        assert_close(with_gradients(lambda *x: attention(*x, pattern, impl="triton"), xs, expanded), expected, 1e-5)


def test_operators_pass_opcheck():
    pattern = build("sharing", 2, 40)
    xs = tensors(1, 40, 2, 1, 16)
    heads = banded.local_intervals(pattern, 0, 2)
    bounds = banded.document_bounds(torch.tensor([0, 15, 40], dtype=torch.int32), 1, 40)
    for documents in ((None, None), bounds):
        torch.library.opcheck(ops.banded_forward, (*xs, heads, 0.25, *documents))
    with torch.no_grad():
        out, lse = ops.banded_forward(*xs, heads, 0.25, None, None)
        plain = [x.detach() for x in xs]
        torch.library.opcheck(ops.banded_backward, (out, *plain, out, lse, heads, 0.25, None, None))
        cache = torch.randn(2, 40, 1, 16)
        torch.library.opcheck(
            ops.banded_decode, (torch.randn(2, 1, 2, 16), cache, cache, torch.tensor([30, 9]), None, heads, 0.25)
        )


def test_compiles_to_one_graph_with_documents_and_checkpointing():
    pattern = build("sharing", 2, 50)
    xs, d_out = tensors(1, 50, 2, 2, 16), torch.randn(1, 50, 2, 16)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)

    def plain(q, k, v):
        return attention(q, k, v, pattern, impl="triton", cu_doc_lens=cu) * 2

    def saved(q, k, v):
        return checkpoint(plain, q, k, v, use_reentrant=False)

    expected = with_gradients(plain, xs, d_out)
    for call in (plain, saved):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_close(with_gradients(compiled, xs, d_out), expected, 1e-6)


def test_selective_checkpointing_keeps_the_output_and_does_not_run_the_forward_again(monkeypatch):
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    pattern = build("exclusive", 2, 40)
    xs, d_out = tensors(1, 40, 2, 2, 16), torch.randn(1, 40, 2, 16)
    launches = []
    monkeypatch.setattr(ops, "query_plan", lambda *a, real=ops.query_plan: launches.append(1) or real(*a))

    def policy(ctx, op, *args, **kwargs):
        keep = op == torch.ops.spattn_olmoe.banded_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def run(q, k, v):
        return attention(q, k, v, pattern, impl="triton").sin()

    out = checkpoint(
        run, *xs, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
    )  # fmt: skip
    gradients = torch.autograd.grad(out, xs, d_out)
    assert len(launches) == 2  # one forward, one dq
    assert_close((out, *gradients), with_gradients(run, xs, d_out), 1e-6)


def test_fsdp_shards_a_layer_around_the_operators(tmp_path):
    """FSDP2 of one rank: the operators' outputs and gradients are those of the layer by itself."""
    import copy

    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    pattern = build("sharing", 2, 40)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(16, 3 * 32)

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (2, 16)) for y in self.project(x).chunk(3, dim=-1))
            return attention(q, k, v, pattern, impl="triton").flatten(-2).sin()

    plain = Layer()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
        x = torch.randn(1, 40, 16)
        out, expected = sharded(x), plain(x)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(sharded.project.weight.grad.full_tensor(), plain.project.weight.grad)
    finally:
        dist.destroy_process_group()


def slots_of(made):
    """``(owner, first tile, end)`` of a plan's slots; a negative owner ``-1 - h`` for the dead tiles of ``h``."""
    table = made.table.tolist()
    return [tuple(table[at + 1 : at + 4]) for at in range(made.slots, 5 * made.slots, 4)]


@pytest.mark.parametrize("T", [1, 127, 128, 1000])
@pytest.mark.parametrize("name", ["exclusive", "sharing", "dense", "gbhalf", "fixed"])
def test_a_plan_names_every_tile_with_a_pair_once_and_no_other(name, T):
    pattern, tile = build(name, 8, 1000), 64
    heads, mask = pattern.table, pattern.dense_mask(T)
    n_tiles = -(-T // tile)
    rows = torch.nn.functional.pad(mask.any(-1), (0, n_tiles * tile - T)).unflatten(1, (n_tiles, tile)).any(-1)
    keys = torch.nn.functional.pad(mask.any(-2), (0, n_tiles * tile - T)).unflatten(1, (n_tiles, tile)).any(-1)
    for made, alive in (
        (plan.query_plan(heads, T, tile, torch.device("cpu")), rows),
        (plan.key_plan(heads, 2, T, tile, torch.device("cpu")), keys.view(4, 2, n_tiles).any(1)),
    ):
        table = made.table.tolist()
        slots = (plan.STRETCHES + 2) * len(alive)
        live = {(owner, t) for owner, first, end in slots_of(made) if owner >= 0 for t in range(first, end)}
        dead = {(-1 - owner, t) for owner, first, end in slots_of(made) if owner < 0 for t in range(first, end)}
        assert live == {(h, t) for h in range(len(alive)) for t in range(n_tiles) if alive[h, t]}
        assert live | dead == {(h, t) for h in range(len(alive)) for t in range(n_tiles)} and not live & dead
        assert made.programs == max(end for end in table[:slots])
        assert made.table.numel() <= 5 * 2 * slots + 4 * len(heads)  # O(H), whatever the length


def finish(work, processors):
    """When the last of some programs ends that start in this order, each on the processor that is free first."""
    free = [0] * processors
    for length in work:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


@pytest.mark.parametrize("name", ["exclusive", "sharing", "dense", "sliding_window"])
def test_programs_start_in_an_order_about_as_good_as_longest_first(name):
    T, tile = 4096, 128
    pattern = build(name, 8, T)
    heads, d = pattern.table, torch.arange(T)
    for made, of_keys in (
        (plan.query_plan(heads, T, tile, torch.device("cpu")), False),
        (plan.key_plan(heads, 1, T, tile, torch.device("cpu")), True),
    ):
        work = []
        for owner, first, end in slots_of(made):
            tiles = range(first, end) if of_keys else reversed(range(first, end))
            for t in tiles if owner >= 0 else ():
                ahead = T - t * tile if of_keys else (t + 1) * tile  # distances below it
                work.append(int(sum(((lo <= d[:ahead]) & (d[:ahead] < hi)).sum() for lo, hi in heads[owner])))
        best = finish(sorted(work, reverse=True), 132)
        assert finish(work, 132) <= best + (max(work) / plan.STRETCHES if name == "dense" else 0)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("name", "H", "G", "D", "S", "start", "leftpad"),
    [
        ("exclusive", 4, 4, 32, 300, 299, None),
        ("sharing", 4, 2, 80, 300, [20, 200], None),
        ("sharing", 4, 2, 64, 300, [20, 200], [3, 190]),
        ("gbhalf", 4, 1, 96, 300, 250, [0, 251]),
        ("dense", 1, 1, 32, 1500, [1490, 40], [0, 7]),
        ("fixed", 3, 3, 32, 200, [0, 150], None),
    ],
)
def test_decoding_agrees_with_attention_under_a_mask(name, H, G, D, S, start, leftpad, T):
    pattern = build(name, H, 256 if S < 1000 else S)
    q, k, v = torch.randn(2, T, H, D), torch.randn(2, S, G, D), torch.randn(2, S, G, D)
    start = torch.tensor(start) if isinstance(start, list) else start - T + 1
    options = {"start": start, "leftpad": None if leftpad is None else torch.tensor(leftpad)}
    expected = cached_attention(q.double(), k.double(), v.double(), pattern, impl="sdpa", **options)
    actual = cached_attention(q, k, v, pattern, impl="triton", **options)
    torch.testing.assert_close(actual, expected.float(), atol=5e-6, rtol=1e-5)
    assert (actual[(expected == 0).all(-1)] == 0).all()


def strided(x):
    """The values of ``x``, of which no two are neighbours in memory."""
    return torch.stack([x, torch.full_like(x, -1)], -1)[..., 0]


def test_decoding_reads_padding_and_starts_of_any_stride():
    pattern = build("sharing", 4, 64)
    q, k, v = torch.randn(3, 1, 4, 16), torch.randn(3, 64, 4, 16), torch.randn(3, 64, 4, 16)
    start, several, one = torch.tensor([60, 61, 63]), torch.tensor([0, 30, 50]), torch.tensor([40])
    for pad in (strided(several), one.expand(3)):
        expected = cached_attention(q, k, v, pattern, start=start, leftpad=pad, impl="sdpa")
        actual = cached_attention(q, k, v, pattern, start=strided(start), leftpad=pad, impl="triton")
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-5)


def test_operators_read_what_they_are_given_of_any_stride():
    T, heads = 70, [bound for head in build("sharing", 4, 64).table for pair in head for bound in pair]
    q, k, v, d_out = (torch.randn(2, T, 4, 16) for _ in range(4))
    bounds = document_bounds(torch.tensor([0, 30, T, 2 * T]), 2, T)
    loose = [strided(x) for x in bounds]
    out, lse = ops.banded_forward(q, k, v, heads, 0.25, *bounds)
    torch.testing.assert_close(ops.banded_forward(*map(strided, (q, k, v)), heads, 0.25, *loose), (out, lse))
    torch.testing.assert_close(
        ops.banded_backward(*map(strided, (d_out, q, k, v, out, lse)), heads, 0.25, *loose),
        ops.banded_backward(d_out, q, k, v, out, lse, heads, 0.25, *bounds),
    )


def test_decoding_splits_a_long_cache_and_never_reads_a_key_out_of_its_intervals():
    pattern = build("exclusive", 2, 4096)
    q, k, v = torch.randn(1, 1, 2, 32), torch.randn(1, 4096, 2, 32), torch.randn(1, 4096, 2, 32)
    assert ops._splits(2, 2048, q.device) > 1
    expected = cached_attention(q, k, v, pattern, start=3000, impl="sdpa")
    d = 3000 - torch.arange(4096)
    for h, ((lo, hi), _) in enumerate(pattern.table):
        unread = (d < lo) | (d >= hi)
        k[:, unread, h] = float("nan")
        v[:, unread, h] = float("nan")
    torch.testing.assert_close(cached_attention(q, k, v, pattern, start=3000, impl="triton"), expected)


def test_decoding_is_what_attention_gives_for_the_last_row():
    pattern = build("sharing", 4, 128)
    q, k, v = tensors(2, 100, 4, 2, 32, requires_grad=False)
    whole = reference.run(Call(q, k, v, pattern, None, scale=32**-0.5, head_offset=0))
    last = cached_attention(q[:, -1:], k, v, pattern, start=torch.tensor(99), impl="triton")
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=1e-5)


def test_refuses_what_it_cannot_compute():
    q, k, v = tensors(1, 64, 4, 4, 32)
    pattern = build("exclusive", 4, 64)
    with pytest.raises(ValueError, match="'longformer' is not made of"):
        attention(q, k, v, build("longformer", 4, 64), impl="triton")
    with pytest.raises(ValueError, match="not torch"):
        attention(q.double(), k.double(), v.double(), pattern, impl="triton")
    with pytest.raises(ValueError, match="cannot multiply bfloat16"):
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), pattern, impl="triton")
    with pytest.raises(ValueError, match="head_dim up to 256, not 320"):
        attention(*tensors(1, 64, 4, 4, 320), pattern, impl="triton")
    with pytest.raises(ValueError, match="without gradients"):
        cached_attention(q[:, -1:], k, v, pattern, start=63, impl="triton")
    with pytest.raises(ValueError, match=r"start must have no dimension or be \(1\,\)"):
        cached_attention(q[:, -1:], k, v, pattern, start=torch.tensor([1, 2]))
    assert unsuitable("triton", Facts("cpu", pattern, 64, False, torch.float32, 32)) is None
