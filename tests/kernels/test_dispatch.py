"""``attention``: what it chooses, and how it refuses a call that does not fit."""

import logging

import pytest
import torch
from attention_cases import Case, build, inputs

from spattn_olmoe import attention
from spattn_olmoe.kernels import Facts, choose, dispatch

PATTERN = build("exclusive", 4, 20)
CASE = Case(T=20, N=20)


def call(pattern=PATTERN, impl="auto", q=None, k=None, v=None, **kwargs):
    given = inputs(CASE, torch.float32, requires_grad=False)
    q, k, v = (own if x is None else x for own, x in zip(given[:3], (q, k, v), strict=True))
    return attention(q, k, v, pattern, impl, **kwargs)


def ints(*values, **kwargs):
    return torch.tensor(values, dtype=torch.int32, **kwargs)


def test_the_example_call_is_good():
    assert call().shape == (2, 20, 4, 8)
    assert call(cu_doc_lens=ints(0, 15, 40)).shape == (2, 20, 4, 8)


# ---- the choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "mask", "documents", "impl"),
    [
        ("cpu", "eball", False, "cpu"),
        ("cpu", "dense", True, "cpu"),
        ("cpu", "reformer", False, "cpu"),
        ("cuda", "dense", False, "sdpa"),
    ],
)
def test_auto_chooses_by_device_and_pattern(device, mask, documents, impl):
    assert choose(Facts(device, build(mask, 4, 256), 256, documents)) == impl


def test_auto_logs_once_what_it_chose(caplog):
    logger = "spattn_olmoe.kernels.dispatch"
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=logger):
        for _ in range(3):
            call()
        said = [r.getMessage() for r in caplog.records if r.name == logger]
        assert said == ["attention.impl=auto: the mask 'exclusive' is computed by 'cpu' on cpu"]
        call(build("sharing", 4, 20))
        said = [r.getMessage() for r in caplog.records if r.name == logger]
        assert said[1:] == ["attention.impl=auto: the mask 'sharing' is computed by 'cpu' on cpu"]


def test_an_explicit_choice_is_not_logged(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO):
        call(impl="reference")
    assert not caplog.records


def test_auto_computes_what_it_chose():
    assert torch.equal(call(), call(impl="cpu"))


# ---- calls that do not fit ---------------------------------------------------------------------------------------


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


GOOD = zeros(2, 20, 4, 8)

BAD_CALLS = {
    "unknown impl": ({"impl": "fast"}, r"attention\.impl='fast' is unknown \(known: auto, reference, cpu, flex, "),
    "q of three dimensions": (
        {"q": zeros(20, 4, 8)},
        r"q must be \(batch, length, heads, head_dim\), not .*\(20, 4, 8",
    ),
    "v of three dimensions": ({"v": zeros(20, 4, 8)}, r"v must be \(batch, length, heads, head_dim\)"),
    "integers": ({"q": GOOD.int()}, r"q is torch\.int32: attention computes in float64, float32, bfloat16 or float16"),
    "dtypes": ({"k": GOOD.double()}, r"k is torch\.float64 on cpu but q is torch\.float32 on cpu: they must agree"),
    "devices": ({"v": GOOD.to("meta")}, r"v is torch\.float32 on meta but q is torch\.float32 on cpu"),
    "lengths": ({"k": zeros(2, 19, 4, 8), "v": zeros(2, 19, 4, 8)}, r"k \(2, 19, 4, 8\) and v .*with q's \(2, 20\)"),
    "batches": ({"k": zeros(1, 20, 4, 8), "v": zeros(1, 20, 4, 8)}, r"k \(1, 20, 4, 8\) and v"),
    "k unlike v": ({"v": zeros(2, 20, 2, 8)}, r"k \(2, 20, 4, 8\) and v \(2, 20, 2, 8\) must be"),
    "head_dim": ({"k": zeros(2, 20, 4, 6), "v": zeros(2, 20, 4, 6)}, r"k \(2, 20, 4, 6\).*head_dim 8"),
    "groups": ({"k": zeros(2, 20, 3, 8), "v": zeros(2, 20, 3, 8)}, "n_heads=4 must be a multiple of n_kv_heads=3"),
    "no groups": ({"k": zeros(2, 20, 0, 8), "v": zeros(2, 20, 0, 8)}, "n_heads=4 must be a multiple of n_kv_heads=0"),
    "heads beyond": ({"head_offset": 1}, "heads 1 to 5 are not among the 4 of SPAttention"),
    "heads before": ({"head_offset": -1}, "heads -1 to 3 are not among the 4 of SPAttention"),
    "pattern of other heads": (
        {"pattern": build("eball", 3, 20)},
        "heads 0 to 4 are not among the 3 of ExclusiveBands",
    ),
    "sdpa for bands": ({"impl": "sdpa"}, r"attention\.impl='sdpa' is dense causal .*not what 'spattention' asks for"),
    "sdpa with documents": (
        {"impl": "sdpa", "pattern": build("dense", 4, 20), "cu_doc_lens": ints(0, 40)},
        r"attention\.impl='sdpa' is dense causal attention without documents",
    ),
    "cpu elsewhere": (
        {"impl": "cpu", "q": GOOD.to("meta"), "k": GOOD.to("meta"), "v": GOOD.to("meta")},
        r"attention\.impl='cpu' computes on the CPU but q is on meta",
    ),
    "documents too short": (
        {"cu_doc_lens": ints(0, 20)},
        r"must rise from 0 to .* 2 \* 20 = 40, but goes from 0 to 20",
    ),
    "documents too long": ({"cu_doc_lens": ints(0, 20, 41)}, "but goes from 0 to 41"),
    "documents from 1": ({"cu_doc_lens": ints(1, 40)}, "but goes from 1 to 40"),
    "documents backwards": ({"cu_doc_lens": ints(0, 30, 20, 40)}, "cu_doc_lens must rise from 0"),
    "documents of floats": ({"cu_doc_lens": torch.tensor([0.0, 40.0])}, "must be a one-dimensional int32 .*float32"),
    "documents in two dimensions": ({"cu_doc_lens": ints([0, 20], [0, 20])}, r"one-dimensional .* shape \(2, 2\)"),
    "no documents": ({"cu_doc_lens": ints(0)}, r"at least two entries, not torch\.int32 of shape \(1,\)"),
    "documents elsewhere": ({"cu_doc_lens": ints(0, 40, device="meta")}, "cu_doc_lens is on meta but q is on cpu"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_call_that_does_not_fit_is_told_why_in_one_line(what):
    kwargs, message = BAD_CALLS[what]
    with pytest.raises(ValueError, match=message) as error:
        call(**kwargs)
    assert "\n" not in str(error.value)
