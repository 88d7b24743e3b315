"""FlexAttention without a GPU: its results, and the block masks that a GPU would be given."""

import pytest
import torch
from attention_cases import CASES, CONTENT, MASKS, OWN, Case, build, dead_rows, inputs
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from spattn_olmoe import attention
from spattn_olmoe.kernels import flex
from spattn_olmoe.kernels.documents import document_starts

ALL = [*MASKS, *OWN]
CPU = torch.device("cpu")


def forward(impl, case, pattern, q, k, v):
    return attention(q, k, v, pattern, impl, cu_doc_lens=case.cu_doc_lens, scale=case.scale, head_offset=case.offset)


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7], CASES[9], CASES[11]], ids=str)
@pytest.mark.parametrize("mask", [*ALL, *CONTENT])
def test_flex_equals_reference(mask, case):
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, torch.float32, requires_grad=False)
    out = forward("flex", case, pattern, q, k, v)
    torch.testing.assert_close(out, forward("reference", case, pattern, q, k, v), rtol=1e-5, atol=1e-5)
    if not pattern.follows_content:
        assert (out[dead_rows(pattern, case)] == 0).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_flex_with_gradients_on_a_cpu_is_refused(which):
    case = Case(T=20, N=20)
    pattern = build("eball", case.H, case.N)
    qkv = [x.requires_grad_(n == which) for n, x in enumerate(inputs(case, requires_grad=False)[:3])]
    with pytest.raises(ValueError, match=r"attention\.impl='flex' has no backward pass on a CPU: use impl='cpu'"):
        attention(*qkv, pattern, "flex")
    with torch.no_grad():
        assert attention(*qkv, pattern, "flex").shape == qkv[0].shape


# ---- how often it is compiled -----------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """Graphs that FlexAttention was compiled to since the test began, by a compiler that leaves them as they are."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    yield graphs, flex.compiled(backend)
    torch._dynamo.reset()


def attend_compiled(compiled, pattern, T):
    H = pattern.n_heads
    q = torch.randn(1, H, T, 8)
    mask = flex.block_mask(pattern, 1, T, H, 0, CPU)
    return compiled(q, q, q, block_mask=mask, scale=1.0, enable_gqa=False)


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_more_masks_and_shapes_than_pytorch_would_compile_are_compiled(graphs):
    found, compiled = graphs
    for mask in ("exclusive", "sharing", "longformer", "bigbird", "reformer"):
        for T in (128, 256, 384):
            for _ in range(2):
                attend_compiled(compiled, build(mask, 4, T), T)
    assert len(found) == 15 > torch._dynamo.config.recompile_limit


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_beyond_the_limit_is_an_error_and_not_all_scores(graphs, monkeypatch):
    _, compiled = graphs
    monkeypatch.setattr(flex, "GRAPHS", 2)
    for T in (128, 256):
        attend_compiled(compiled, build("exclusive", 4, T), T)
    with pytest.raises(ValueError, match=r"impl='flex' has been compiled 2 times in this process.*use fewer of them"):
        attend_compiled(compiled, build("exclusive", 4, 384), 384)
    attend_compiled(compiled, build("exclusive", 4, 128), 128)  # what is compiled still runs


def test_lengths_that_vary_are_few_lengths_of_whole_blocks():
    padded = {T: flex.padded_length(T) for T in range(1, 2**14 + 1)}
    assert all(T <= to < T + max(flex.BLOCK, T / 8 + 1) and to % flex.BLOCK == 0 for T, to in padded.items())
    assert len(set(padded.values())) == 8 + 4 * 8  # to 1024, and four doublings
    assert all(padded[T] == T for T in (128, 1024, 3072, 4096, 16384))


# ---- block masks -------------------------------------------------------------------------------------------------


def kept(blocks, num, indices):
    """A block mask's table as bool, without the package's own helpers."""
    table = torch.zeros_like(indices, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in num.shape)):
        b, h, row = place.tolist()
        table[b, h, row, indices[b, h, row, : num[b, h, row]].long()] = True
    assert table.shape[-1] == blocks
    return table


def partial_and_full(mask, blocks):
    return (
        kept(blocks, mask.kv_num_blocks, mask.kv_indices),
        kept(blocks, mask.full_kv_num_blocks, mask.full_kv_indices),
    )


@pytest.mark.parametrize(
    ("H", "N", "T"),
    [
        (4, 512, 512),
        (8, 1024, 1024),
        (3, 700, 896),
        (6, 1600, 640),
        (5, 384, 128),
        (2, 2, 256),
        (2, 508, 512),  # windows that end one distance short of a block's farthest
        (2, 514, 640),  # a band that begins with a block's nearest
    ],
)
@pytest.mark.parametrize("mask", [*MASKS, "two_far_intervals"])
def test_blocks_are_those_that_pytorch_finds_by_looking_at_every_pair(mask, H, N, T):
    pattern = build(mask, H, N)
    ours = flex.block_mask(pattern, 1, T, H, 0, CPU)
    theirs = create_block_mask(pattern.mask_mod, None, H, T, T, device="cpu", BLOCK_SIZE=flex.BLOCK)
    assert ours.shape == theirs.shape
    assert ours.seq_lengths == theirs.seq_lengths
    n = T // flex.BLOCK
    for our_blocks, their_blocks in zip(partial_and_full(ours, n), partial_and_full(theirs, n), strict=True):
        assert torch.equal(our_blocks, their_blocks)
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize(("H", "N", "T"), [(4, 512, 500), (3, 300, 641), (4, 100, 1), (4, 600, 129)])
@pytest.mark.parametrize("mask", [*MASKS, "two_far_intervals"])
def test_ragged_lengths_keep_the_blocks_that_hold_a_pair(mask, H, N, T):
    """PyTorch calls a block at the ragged end partial even if it is full of pairs, so only the sum must agree."""
    pattern = build(mask, H, N)
    ours = flex.block_mask(pattern, 1, T, H, 0, CPU)
    theirs = create_block_mask(pattern.mask_mod, None, H, T, T, device="cpu", BLOCK_SIZE=flex.BLOCK)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    n = -(-T // flex.BLOCK)
    partial, full = partial_and_full(ours, n)
    assert not (partial & full).any()
    dense = pattern.dense_mask(T)
    for _, h, row, column in full.nonzero().tolist():
        block = dense[h, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
        assert block.all()
        assert block.shape[1] == 128  # keys beyond the input are never called attended


@pytest.mark.parametrize("mask", ["dense", "sharing", "eball", "reformer"])
def test_blocks_of_documents_hold_every_pair_and_full_ones_nothing_else(mask):
    case = Case(T=640, N=640, H=4, B=2, docs=(130, 500, 20, 0, 374, 256))
    pattern = build(mask, case.H, case.N)
    ours = flex.block_mask(pattern, case.B, case.T, case.H, 0, CPU, case.cu_doc_lens)
    start = document_starts(case.cu_doc_lens, case.B, case.T)
    dense = pattern.dense_mask(case.T) & (torch.arange(case.T) >= start[:, None, :, None])
    in_blocks = dense.unflatten(3, (5, 128)).unflatten(2, (5, 128)).transpose(3, 4)  # (B, H, rows, columns, 128, 128)
    partial, full = partial_and_full(ours, 5)
    assert not (partial & full).any()
    assert (in_blocks.flatten(-2).any(-1) <= (partial | full)).all()
    assert (full <= in_blocks.flatten(-2).all(-1)).all()
    # Nor does it keep everything: documents remove blocks.
    without = flex.block_mask(pattern, 1, case.T, case.H, 0, CPU)
    assert (partial | full).sum() < case.B * without.to_dense().sum()


def test_block_masks_are_of_the_local_heads():
    pattern = build("eball", 8, 1024)
    whole = flex.block_mask(pattern, 1, 1024, 8, 0, CPU)
    part = flex.block_mask(pattern, 1, 1024, 3, 4, CPU)
    assert torch.equal(part.to_dense(), whole.to_dense()[:, 4:7])


def test_block_masks_are_shared_by_the_layers():
    pattern, same = build("exclusive", 4, 512), build("exclusive", 4, 512)
    first = flex.block_mask(pattern, 1, 512, 4, 0, CPU)
    assert flex.block_mask(same, 1, 512, 4, 0, CPU) is first
    assert flex.block_mask(same, 7, 512, 4, 0, CPU) is first  # the batch does not matter without documents
    assert flex.block_mask(pattern, 1, 256, 4, 0, CPU) is not first
    assert flex.block_mask(pattern, 1, 512, 2, 2, CPU) is not first
    assert flex.block_mask(build("eball", 4, 512), 1, 512, 4, 0, CPU) is not first


def test_block_masks_of_documents_are_shared_until_the_documents_change():
    pattern = build("exclusive", 4, 256)
    lengths = torch.tensor([0, 100, 256], dtype=torch.int32)
    first = flex.block_mask(pattern, 1, 256, 4, 0, CPU, lengths)
    assert flex.block_mask(pattern, 1, 256, 4, 0, CPU, lengths) is first
    assert flex.block_mask(pattern, 1, 256, 4, 0, CPU, lengths.clone()) is not first
    lengths[1] = 50  # a buffer that is used again
    changed = flex.block_mask(pattern, 1, 256, 4, 0, CPU, lengths)
    assert changed is not first
    q = k = v = torch.randn(1, 256, 4, 8)
    torch.testing.assert_close(
        attention(q, k, v, pattern, "flex", lengths), attention(q, k, v, pattern, "reference", lengths)
    )


def test_block_masks_of_documents_are_forgotten_with_them():
    pattern = build("exclusive", 4, 256)
    before = len(flex._document_masks)
    lengths = torch.tensor([0, 100, 256], dtype=torch.int32)
    flex.block_mask(pattern, 1, 256, 4, 0, CPU, lengths)
    assert len(flex._document_masks) == before + 1
    del lengths
    assert len(flex._document_masks) == before


@pytest.mark.parametrize("mask", ["sharing", "reformer", "reformer_lsh"])
def test_compiled_flex_takes_our_masks(mask):
    """What runs on a GPU is the compiled kernel: masks must survive tracing."""
    case = Case(T=200, N=256, H=4, G=2, B=1, D=16, offset=1, local=2)
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, torch.float32, requires_grad=False)
    block_mask = flex.mask_of_call(pattern, q, k, case.offset)
    compiled = torch.compile(flex_attention, dynamic=False)
    out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, forward("reference", case, pattern, q, k, v), rtol=1e-5, atol=1e-5)
