"""Scores against oracles that never pad or batch, and against transformers' OLMoE under lm-eval's own model."""

from __future__ import annotations

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from spattn_olmoe.evaluation.model import SPAttnLM
from spattn_olmoe.patterns import VARIANTS

TEXT = (
    "The assignment statement binds a name to a value. If the name is already bound, the old value is released. "
    "Lists are mutable; tuples are not: 'a, b = b, a' swaps two names without a third. def f(x):\n    return x + 1\n"
)
SECTIONS = [
    VARIANTS["sharing"].section,
    VARIANTS["exclusive"].section | {"follows_input": True},
    VARIANTS["longformer"].section,
    VARIANTS["reformer"].section | {"follows_input": True},
]


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def pairs(n: int = 40) -> list[tuple[str, str]]:
    """Contexts from nothing to far beyond the training length, continuations of several lengths."""
    generator = random.Random(0)
    found = [("", "The name"), ("x", " y")]
    while len(found) < n:
        start, size = generator.randrange(100), generator.choice([1, 2, 8, 30, 60, 180])
        text = (TEXT * 3)[start:]
        found.append((text[:size].rstrip() or "a", " " + text[size : size + generator.randrange(3, 25)].strip()))
    return found


def oracle(lm: SPAttnLM, context: str, continuation: str) -> tuple[float, bool]:
    """One unpadded forward pass in which every position is computed."""
    whole = lm.tok_encode(context + continuation)
    cut = len(lm.tok_encode(context))
    whole, cut = (whole, cut) if cut else ([lm.eot_token_id, *whole], 1)
    read = whole[:-1][-lm.max_length :]
    logprobs = lm._module.model_forward(torch.tensor([read]))[0].log_softmax(-1)
    targets = torch.tensor(whole[cut:])
    last = logprobs[-len(targets) :]
    chosen = last.gather(1, targets[:, None]).double()  # at -80 a float32 sum alone is off by nearly 1e-5
    return float(chosen.sum()), bool((last.argmax(1) == targets).all())


def test_a_continuation_that_is_merged_into_its_context_is_scored_by_itself(checkpoint_of):
    lm = SPAttnLM(checkpoint_of("spattention"))
    # a word that is one token, cut where no token ends
    words = (lm._tokenizer.decode([i]) for i in range(300, 512))
    word = next(w for w in words if w.isalpha() and len(w) > 2 and len(lm.tok_encode(w)) == 1)
    context, continuation = word[:-1], word[-1]
    ids = lm.tok_encode(context), lm.tok_encode(continuation)
    spaces = lm.tok_encode("  x")
    merged, spaced = lm.loglikelihood(instances("loglikelihood", (context, continuation), ("  ", "x")))
    for got, (read, scored) in ((merged, ids), (spaced, ([lm.eot_token_id], spaces))):
        logprobs = lm._module.model_forward(torch.tensor([read + scored[:-1]]))[0].log_softmax(-1)[-len(scored) :]
        expected = float(logprobs.gather(1, torch.tensor(scored)[:, None]).double().sum())
        assert got[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_score_depends_on_nothing_beside_its_request(checkpoint_of, section):
    requests = instances("loglikelihood", *pairs())
    lm = SPAttnLM(checkpoint_of(**section))
    expected = [oracle(lm, *request.args) for request in requests]
    assert max(score for score, _ in expected) - min(score for score, _ in expected) > 1  # not all alike
    for batch_size, seed in ((1, 0), (3, 1), (16, 2), (64, 3)):
        lm.batch_size = batch_size
        order = random.Random(seed).sample(range(len(requests)), len(requests))
        found = lm.loglikelihood([requests[i] for i in order], disable_tqdm=True)
        for i, (score, greedy) in zip(order, found, strict=True):
            assert score == pytest.approx(expected[i][0], abs=1e-5)
            assert greedy == expected[i][1]


@pytest.mark.parametrize("mask", ["dense", "sharing"])
def test_an_export_under_lm_evals_own_model_scores_alike(checkpoint_of, tmp_path, mask):
    pytest.importorskip("transformers")
    from spattn_olmoe.model.hf.export import export

    ours = SPAttnLM(checkpoint_of(**VARIANTS[mask].section), max_length=64)
    export(ours.checkpoint, tmp_path / "exported")
    theirs = get_model("hf").create_from_arg_string(
        f"pretrained={tmp_path / 'exported'},trust_remote_code=True,max_length=64", {"batch_size": 8, "device": "cpu"}
    )
    requests = instances("loglikelihood", *pairs())
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]
    rolling = instances("loglikelihood_rolling", (TEXT,), (TEXT[:20],), (TEXT * 4,))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    prompts = instances(
        "generate_until", *((p, {"until": ["\n"], "max_gen_toks": 12}) for p in ("The name", "def f(", "a"))
    )
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_long_contexts_lose_their_beginning_and_are_counted(checkpoint_of):
    lm = SPAttnLM(checkpoint_of("standard"))
    assert lm.max_length == 32
    long, short = (TEXT.rstrip(), " a name"), ("The", " a name")
    scores = lm.loglikelihood(instances("loglikelihood", long, short, long), disable_tqdm=True)
    assert lm.truncated == 2
    assert scores[0][0] == pytest.approx(oracle(lm, *long)[0], abs=1e-5)
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens is longer than max_length=32"):
        lm.loglikelihood(instances("loglikelihood", ("The", " " + TEXT)), disable_tqdm=True)


def test_rolling_scores_predict_each_token_once(checkpoint_of):
    lm = SPAttnLM(checkpoint_of("spattention", local_sharing=True))
    tokens = lm.tok_encode(TEXT)
    assert len(tokens) > 2 * lm.max_length
    expected, done = 0.0, 0
    for end in [*range(32, len(tokens), 32), len(tokens)]:
        read = [lm.eot_token_id, *tokens][max(0, end - 32) : end]
        logprobs = lm._module.model_forward(torch.tensor([read]))[0].log_softmax(-1)
        targets = torch.tensor(tokens[done:end])
        expected += float(logprobs[-len(targets) :].gather(1, targets[:, None]).sum())
        done = end
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (TEXT,)), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("section", SECTIONS[:3])
def test_generated_text_is_that_of_greedy_decoding_without_cache_or_batch(checkpoint_of, section):
    lm = SPAttnLM(checkpoint_of(**section), batch_size=8, max_length=64)
    prompts = ["The name", "def f(x):\n    return", "a", TEXT[:120]]
    expected = []
    for prompt in prompts:
        tokens, new = lm.tok_encode(prompt)[-54:], []
        for _ in range(10):
            new.append(int(lm._module.model_forward(torch.tensor([tokens + new]))[0, -1].argmax()))
        expected.append(lm._tokenizer.decode(new[: new.index(lm.eot_token_id)] if lm.eot_token_id in new else new))
    assert all(expected)
    for until in ([], [expected[0][1]], [expected[0][1:3]]):
        requests = instances("generate_until", *((p, {"until": until, "max_gen_toks": 10}) for p in prompts))
        found = lm.generate_until(requests, disable_tqdm=True)
        assert found == [text.split(until[0])[0] if until else text for text in expected]
    assert found != expected


def test_band_length_can_be_overridden(checkpoint_of):
    folder = checkpoint_of("spattention", local_sharing=False)
    request = instances("loglikelihood", ("The name is", " a value"))
    trained, follows = (SPAttnLM(folder, follows_input=b).loglikelihood(request)[0][0] for b in (False, True))
    assert abs(trained - follows) > 1e-3
    assert SPAttnLM(folder).loglikelihood(request)[0][0] == trained


def test_lm_eval_knows_the_model(checkpoint_of):
    lm = get_model("spattn_olmoe").create_from_arg_string(
        f"checkpoint={checkpoint_of('eball')},follows_input=true", {"batch_size": "4", "device": None}
    )
    assert isinstance(lm, SPAttnLM) and lm.batch_size == 4
    assert {layer["name"] for layer in lm.checkpoint.layers} == {"eball"}
    assert {layer["follows_input"] for layer in lm.checkpoint.layers} == {True}
    with pytest.raises(ValueError, match="batch_size='auto'"):
        SPAttnLM(checkpoint_of("eball"), batch_size="auto")
