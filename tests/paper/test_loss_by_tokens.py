"""How losses of types lie after more tokens: what is planned, fitted and reported."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spattn_olmoe.machine import describe
from spattn_olmoe.paper import loss_by_tokens
from spattn_olmoe.paper.loss_by_tokens import CONFIG, MASKS, Fit

TOKENS = [0, *(200_000 * n for n in range(1, 16))]


def curve(fit: Fit) -> dict[int, float]:
    return {tokens: float(fit(tokens)) if tokens else 7.6 for tokens in TOKENS}


@given(st.floats(0.5, 3), st.floats(0.5, 4), st.floats(0.1, 1))
def test_a_fit_finds_the_curve_that_it_is_of(E, A, alpha):
    true = Fit(E, A, alpha, 0.0)
    found = loss_by_tokens.fit(curve(true))
    assert found.rms < 1e-3
    assert float(found(30e6)) == pytest.approx(float(true(30e6)), abs=0.05)


def test_points_of_warm_up_are_left_out_and_three_are_no_fit():
    with pytest.raises(ValueError, match="3 points after the first 2: a fit needs 4"):
        loss_by_tokens.fit(dict.fromkeys(TOKENS[:5], 5.0))
    true = Fit(1.0, 3.0, 0.4, 0.0)
    disturbed = curve(true) | {TOKENS[1]: 100.0}
    assert loss_by_tokens.fit(disturbed) == loss_by_tokens.fit(curve(true))


def test_masks_of_a_seed_start_alike_and_all_are_evaluated_as_often(tmp_path):
    runs = loss_by_tokens.plan(CONFIG, MASKS, seeds=2, out=tmp_path, overrides=["trainer.max_duration.value=30"])
    assert [(run.variant, run.seed) for run in runs] == [(mask, seed) for seed in (0, 1) for mask in MASKS]
    experiments = [run.experiment() for run in runs]
    seeds = [(e.init_seed, e.data_loader.seed) for e in experiments]
    assert seeds[0] == seeds[2] != seeds[3] == seeds[5]
    assert {e.trainer.callbacks["lm_evaluator"].eval_interval for e in experiments} == {2}
    rates = [experiments[0].train_module.scheduler.get_lr(2e-3, step, 1500) for step in (100, 800, 1500)]
    assert rates == [2e-3] * 3  # else a point of a curve would not be the end of a shorter run


def test_the_report_pairs_seeds_and_says_what_cannot_be_told():
    def curves(*apart: float) -> list[dict[int, float]]:
        return [curve(Fit(1.0 + 0.3 * seed + d, 3.0, 0.4, 0.0)) for seed, d in enumerate(apart)]

    results = {
        "machine": describe("cpu"),
        "curves": {
            "dense": curves(0, 0, 0),
            "sharing": curves(-0.1, -0.1, -0.11),
            "exclusive": curves(-0.1, 0.1, 0.01),
            "eball": curves(-0.1, -0.11, -0.13),
        },
    }
    text = loss_by_tokens.markdown(json.loads(json.dumps(results)))  # as it is read again
    assert text == loss_by_tokens.markdown(results)
    (sharing,) = [line for line in text.splitlines() if line.startswith("| `sharing` | -")]
    assert sharing.count("-0.1033 (-0.1177 to -0.0890)") >= 5 and "cannot be told" not in sharing
    (exclusive,) = [line for line in text.splitlines() if line.startswith("| `exclusive` | +")]
    assert exclusive.count("cannot be told") == 6
    (eball,) = [line for line in text.splitlines() if line.startswith("| `eball` | -")]
    assert eball.count("(-0.1513 to -0.0754), cannot be told") >= 5  # told alone, but not as one of 18 cells
    assert "fit, 30.0 M" in text and "| `dense` | 1.3000 +- 0.3000 | 3.0000 +- 0.0000 | 0.4000 +- 0.0000 |" in text
    assert len(loss_by_tokens.picture(results).axes[0].lines) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--scale", "paper"),
            "loss_by_tokens --scale paper: the paper has no such experiment; use --scale cpu or gpu",
        ),
        (("--variants", "eball"), "--variants eball: name two or more, the first to compare the others with"),
        (
            ("--dry-run", "trainer.max_duration.value=5"),
            "trainer.max_duration.value=5: loss_by_tokens needs 15 steps or more",
        ),
        (
            ("--scale", "gpu", "--dry-run"),
            "train_module.scheduler: its rate decays, so that a point of a curve would not be the end of a shorter run: add "
            "train_module.scheduler.alpha_f=1.0 for one that does not",
        ),
    ],
)
def test_what_it_cannot_do_gets_one_line(reproduce, words, said):
    code, _, error = reproduce("loss_by_tokens", *words)
    assert (code, error) == (2, f"error: {said}\n")
