"""Every implementation that runs on a CPU: the same outputs, the same gradients, zeros where there is no key."""

import itertools

import pytest
import torch
from attention_cases import CASES, CONTENT, MASKS, OWN, Case, build, dead_rows, inputs, numpy_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from spattn_olmoe import attention

ALL = [*MASKS, *OWN]


def run(impl, case, pattern, qkvw, cu_doc_lens=None):
    """Output and gradients of q, k, v."""
    q, k, v, w = qkvw
    cu_doc_lens = case.cu_doc_lens if cu_doc_lens is None else cu_doc_lens
    out = attention(q, k, v, pattern, impl, cu_doc_lens=cu_doc_lens, scale=case.scale, head_offset=case.offset)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    return out, *torch.autograd.grad((out * w).sum(), (q, k, v))


def forward(impl, case, pattern, q, k, v):
    with torch.no_grad():
        return attention(
            q, k, v, pattern, impl, cu_doc_lens=case.cu_doc_lens, scale=case.scale, head_offset=case.offset
        )


# ---- reference against NumPy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(T=1, N=8),
        Case(T=21, N=21, G=2),
        Case(T=13, N=24, H=6, G=1, B=1),
        Case(T=30, N=17, scale=0.2),
        Case(T=24, N=24, docs=(10, 21, 0, 17)),
        Case(T=20, N=20, H=6, G=3, offset=2, local=2, docs=(5, 20, 15)),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ALL)
def test_reference_is_textbook_attention(mask, case):
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    expected = numpy_attention(q, k, v, pattern.dense_mask(case.T).tolist(), case)
    torch.testing.assert_close(forward("reference", case, pattern, q, k, v), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu", "flex"])
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("mask", ["dense", "sharing", "every_other"])
def test_a_scale_may_be_zero_or_negative(mask, scale, impl):
    case = Case(T=70, N=70, scale=scale)
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    expected = numpy_attention(q, k, v, pattern.dense_mask(case.T).tolist(), case)
    torch.testing.assert_close(forward(impl, case, pattern, q, k, v), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_must_be_finite(scale):
    q = torch.randn(1, 3, 4, 8)
    with pytest.raises(ValueError, match=r"scale=.*finite"):
        attention(q, q, q, build("dense", 4, 8), scale=scale)


@pytest.mark.parametrize("mask", ["sharing", "gbhalf", "every_other"])
def test_reference_gradients_are_those_of_finite_differences(mask):
    case = Case(T=6, N=6, H=2, G=1, B=1, D=3, docs=(4, 2))
    q, k, v, _ = inputs(case)
    pattern = build(mask, case.H, case.N)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, pattern, "reference", case.cu_doc_lens), (q, k, v))


def test_reference_in_half_precision_computes_in_float32():
    case = Case(T=40, N=40)
    q, k, v, _ = inputs(case, dtype=torch.bfloat16, requires_grad=False)
    pattern = build("sharing", case.H, case.N)
    expected = forward("reference", case, pattern, q.float(), k.float(), v.float()).bfloat16()
    assert torch.equal(forward("reference", case, pattern, q, k, v), expected)


# ---- cpu against reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mask", [*ALL, *CONTENT])
def test_cpu_equals_reference_in_float64(mask, case):
    pattern = build(mask, case.H, case.N)
    qkvw = inputs(case)
    for got, expected in zip(run("cpu", case, pattern, qkvw), run("reference", case, pattern, qkvw), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("case", [CASES[3], CASES[7], CASES[9]], ids=str)
@pytest.mark.parametrize("mask", ALL)
def test_cpu_in_lower_precision_is_near_the_float64_reference(mask, case, dtype, tolerance):
    """The error of each result, as a share of its largest value."""
    pattern = build(mask, case.H, case.N)
    qkvw = inputs(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkvw[:3]], qkvw[3].double()
    expected = run("reference", case, pattern, (*exact[0], exact[1]))
    for got, right in zip(run("cpu", case, pattern, qkvw), expected, strict=True):
        assert (got.double() - right).abs().max() <= tolerance * max(1.0, right.abs().max())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_cpu_equals_reference_on_any_shape(data):
    G = data.draw(st.integers(1, 3), "G")
    H = G * data.draw(st.integers(1, 3), "heads in a group")
    N = data.draw(st.integers(H, 400), "N")
    B, T = data.draw(st.integers(1, 2), "B"), data.draw(st.integers(1, 400), "T")
    cuts = data.draw(st.none() | st.lists(st.integers(0, B * T), max_size=4).map(sorted), "cuts")
    bounds = None if cuts is None else [0, *cuts, B * T]
    docs = None if bounds is None else tuple(b - a for a, b in itertools.pairwise(bounds))
    case = Case(T=T, N=N, H=H, G=G, B=B, D=4, docs=docs)
    mask = data.draw(st.sampled_from([*ALL, *CONTENT]), "mask")
    follows_input = data.draw(st.sampled_from([False, True]), "follows_input")
    pattern = build(mask, H, N, follows_input=follows_input)
    qkvw = inputs(case)
    for got, expected in zip(run("cpu", case, pattern, qkvw), run("reference", case, pattern, qkvw), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_cpu_takes_views():
    """Queries, keys and values as views of one projection, as a fused QKV gives them."""
    case = Case(T=150, N=150, D=8)
    fused = torch.randn(case.B, case.T, 3 * case.H, case.D, dtype=torch.float64)
    q, k, v = fused.split(case.H, dim=2)
    pattern = build("sharing", case.H, case.N)
    got = forward("cpu", case, pattern, q, k, v)
    torch.testing.assert_close(got, forward("reference", case, pattern, q, k, v), rtol=1e-10, atol=1e-11)


# ---- rows without keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[8], CASES[9], CASES[11]], ids=str)
@pytest.mark.parametrize("mask", ["exclusive", "gbhalf", "every_other", "two_far_intervals"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_without_keys_are_zero_with_zero_gradient(impl, mask, case):
    pattern = build(mask, case.H, case.N)
    dead = dead_rows(pattern, case)
    assert dead.any()
    out, dq, dk, dv = run(impl, case, pattern, inputs(case, torch.float32))
    assert (out[dead] == 0).all()
    assert (dq[dead] == 0).all()
    assert (out[~dead] != 0).any(-1).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("case", [Case(T=200, N=200, B=1), Case(T=90, N=90, G=2, docs=(30, 75, 75))], ids=str)
@pytest.mark.parametrize("mask", ["exclusive", "gbhalf", "every_other", "two_far_intervals"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_without_keys_stay_zero_beside_huge_values(impl, mask, case):
    pattern = build(mask, case.H, case.N)
    dead = dead_rows(pattern, case)
    q, k, v, w = inputs(case, torch.float32, requires_grad=False)
    q, k, v = ((x * factor).requires_grad_() for x, factor in ((q, 1.0), (k, 1e34), (v, 1e36)))
    out = attention(q, k, v, pattern, impl, case.cu_doc_lens)
    (dq,) = torch.autograd.grad((out * w)[dead].sum(), q)
    assert (out[dead] == 0).all()
    assert (dq[dead] == 0).all()


def test_rows_without_keys_stay_zero_in_the_reference_even_where_scores_overflow():
    case = Case(T=30, N=30)
    pattern = build("eball", case.H, case.N)
    dead = dead_rows(pattern, case)
    q, k, v, w = inputs(case, torch.float32, requires_grad=False)
    q = (q * 1e20).requires_grad_()
    out = attention(q, k * 1e20, v, pattern, "reference")
    (dq,) = torch.autograd.grad((out * w)[dead].sum(), q)
    assert (out[dead] == 0).all()
    assert (dq[dead] == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_the_reference_computes_no_nan_on_the_way():
    """Rows without keys are a softmax of nothing: NaN, hidden or not, would stop whoever looks for one of his own."""
    case = Case(T=30, N=30)
    with torch.autograd.detect_anomaly(check_nan=True):
        results = run("reference", case, build("eball", case.H, case.N), inputs(case))
    assert all(torch.isfinite(x).all() for x in results)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_an_input_that_no_head_attends_gives_zeros_and_zero_gradients(impl):
    pattern = build("eball", 4, 64)
    case = Case(T=10, N=64, offset=2, local=2)
    for x in run(impl, case, pattern, inputs(case)):
        assert (x == 0).all()


# ---- what is not attended has no influence -----------------------------------------------------------------------


@pytest.mark.parametrize("mask", [*MASKS, *CONTENT])
def test_other_documents_and_later_tokens_have_no_influence(mask):
    case = Case(T=100, N=100, B=1, docs=(40, 60))
    pattern = build(mask, case.H, case.N)
    q, k, v, _ = inputs(case, requires_grad=False)
    before = forward("cpu", case, pattern, q, k, v)
    for x in (k, v):
        x[:, :40] += 3.0  # another document
        x[:, 80:] -= 2.0  # later
    assert torch.equal(forward("cpu", case, pattern, q, k, v)[:, 40:80], before[:, 40:80])


def test_documents_are_attended_as_if_alone():
    case = Case(T=100, N=100, B=1, docs=(37, 63))
    q, k, v, _ = inputs(case, requires_grad=False)
    for mask in ("exclusive", "sharing", "gbhalf", "reformer", "reformer_lsh"):
        pattern = build(mask, case.H, case.N)
        together = forward("cpu", case, pattern, q, k, v)
        alone = torch.cat([attention(*(x[:, part] for x in (q, k, v)), pattern) for part in DOCUMENTS], dim=1)
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-11)


DOCUMENTS = (slice(0, 37), slice(37, 100))


# ---- band length -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "impl"),
    [
        *((mask, impl) for mask in (*MASKS, *CONTENT) for impl in ("reference", "cpu")),
        ("eball", "flex"),
        ("bigbird", "flex"),
    ],
)
def test_band_length_input_attends_as_a_pattern_of_that_length(mask, impl):
    case = Case(T=50, N=160)
    q, k, v, _ = inputs(case, torch.float32, requires_grad=False)
    got = forward(impl, case, build(mask, case.H, 160, follows_input=True), q, k, v)
    torch.testing.assert_close(got, forward("reference", case, build(mask, case.H, 50), q, k, v))


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
@pytest.mark.parametrize("impl", ["auto", "reference", "cpu", "flex", "sdpa"])
@pytest.mark.parametrize("follows_input", [False, True])
def test_nothing_in_nothing_out(impl, shape, follows_input):
    q = torch.randn(*shape, 4, 8, requires_grad=True)
    out = attention(q, q, q, build("dense", 4, 8, follows_input=follows_input), impl)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


# ---- sdpa --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case(T=40, N=40), Case(T=33, N=20, G=2, scale=0.3)], ids=str)
def test_sdpa_is_dense_causal_attention(case):
    pattern = build("dense", case.H, case.N)
    qkvw = inputs(case)
    for got, expected in zip(run("sdpa", case, pattern, qkvw), run("reference", case, pattern, qkvw), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_sdpa_serves_a_window_that_covers_the_input():
    case = Case(T=11, N=40)
    pattern = build("sliding_window", case.H, case.N)  # d <= 10
    q, k, v, _ = inputs(case, requires_grad=False)
    torch.testing.assert_close(forward("sdpa", case, pattern, q, k, v), forward("reference", case, pattern, q, k, v))
