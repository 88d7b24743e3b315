"""Comparisons and reports of made-up results with known answers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from spattn_olmoe import build_pattern
from spattn_olmoe.evaluation.compare import NO_DIFFERENCE, compare
from spattn_olmoe.evaluation.suites import SUITES
from spattn_olmoe.paper import appendix, held_out, report
from spattn_olmoe.paper.comparison import Comparison
from spattn_olmoe.paper.runs import SCALES, TABLES
from spattn_olmoe.patterns import VARIANTS

T, H = 32, 4


def made_up(variant: str, seed: int, shift: float, options: dict) -> dict:
    """A run whose held-out losses are noise of the seed and the sequence, and ``shift``."""
    sequences = 3 + shift + np.random.default_rng(seed).normal(0, 0.01, 50)
    rows = [
        {"context": c, "loss": sequences.mean(), "stderr": 0.01, "sequences": sequences.tolist()}
        for c in ([1, T], [1, 16])
    ]
    pattern = build_pattern(n_heads=H, band_length=T, **options).to_config()
    return {
        "run": f"m-{variant}-seed{seed}",
        "model": "m",
        "variant": variant,
        "seed": seed,
        "steps": 30,
        "tokens": 30,
        "parameters": 5,
        "start": dict.fromkeys(("weights", "order", "data"), "0" * 64),
        "training_loss": list(np.linspace(4, 3 + shift, 30)),
        "attention": [pattern],
        "held_out": {"ids": "same", "sequences": 50, "length": T, "rows": rows},
        "short_prompts": [{"length": 8, "train": sequences.tolist(), "input": (sequences + 0.5).tolist()}],
        "dead_rows": {"sequences": 0.25, "documents": 0.5},
        "machine": {
            "device": "d",
            "cores": 1,
            "threads": 1,
            "date": "2026-11-22T00:00:00+00:00",
            "versions": {"torch": "2"},
            "commit": "c",
            "changed": False,
            "command": "x",
        },
    }


SHIFTS = {
    "sharing": (0.0, {"name": "spattention", "local_sharing": True}),
    "sliding_window": (0.2, {"name": "sliding_window"}),
    "gbhalf": (-0.1, {"name": "gbhalf"}),
    "eball": (-0.1, {"name": "eball"}),
    "exclusive": (-0.1, {"name": "spattention"}),
}


def answered(more: int) -> dict:
    """Scores of table 2, of which the first column has so many right answers more than ``answered(0)``."""
    suite, measurements = SUITES["table2"], {}
    for column in suite.columns:
        right = 40 + (more if column == suite.columns[0] else 0)
        answers = [1.0] * right + [0.0] * (100 - right)
        measurements[column.key] = {
            "num_fewshot": column.num_fewshot,
            "metrics": {column.metric: {"value": right / 100, "stderr": 0.05, "n": 100}},
            "questions": {column.task: {"doc_hash": list(range(100)), column.metric: answers}},
        }
    own = {"suite": suite.name, "columns": [vars(column) for column in suite.columns], "measurements": measurements}
    return {**own, "offline": True, "limit": None, "max_length": T, "truncated_requests": 0}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    results = [made_up(v, seed, shift, options) for v, (shift, options) in SHIFTS.items() for seed in range(3)]
    (found,) = Comparison.of(results)
    return found


def test_differences_are_from_the_mask_of_the_papers_tables(comparison):
    found = comparison.differences()
    assert "sharing" not in found
    for variant, (d, p) in found.items():
        assert d.mean == pytest.approx(SHIFTS[variant][0])
        assert d.interval == pytest.approx((d.mean, d.mean), abs=1e-6) and p < 1e-6  # noise is shared, and so cancels
    assert comparison.twins() == [("eball", "exclusive", 0.0)]


def test_what_is_not_paired_is_refused(comparison):
    results = [r for rs in comparison.results.values() for r in rs]
    with pytest.raises(ValueError, match="not comparable"):
        Comparison.of(results[:-1])
    other = {**results[-1], "held_out": {**results[-1]["held_out"], "ids": "other"}}
    with pytest.raises(ValueError, match="not comparable"):
        Comparison.of([*results[:-1], other])


def test_the_report_says_what_the_losses_say(comparison):
    assert report.paper_order("table3") == ["sharing", "sliding_window", "gbhalf", "eball"]
    text = report.markdown("table3", [comparison], SCALES["cpu"].scope, {})
    assert SCALES["cpu"].scope in text
    verdicts = dict(re.findall(r"^\| (\w+ before \w+) \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    assert verdicts == {
        "sharing before sliding_window": "as in the paper",
        "sliding_window before gbhalf": "the other way round",
        "gbhalf before eball": "cannot be told",
    }
    assert re.search(
        r"^\| sliding_window \| .* \| 3\.2\d+ \+- \d\.\d{4} \| \+0\.2000 \| \+0\.2000 to \+0\.2000 ", text, re.MULTILINE
    )
    assert "| eball, 8 |" in text and "+0.5000" in text
    assert "EBALL | 0.5091 +- 0.0140" in text  # the paper's own numbers, with the errors their tasks imply
    pairs = build_pattern("eball", H, T).attended_pairs() / build_pattern("standard", H, T).attended_pairs()
    assert f"| eball | {100 * pairs:.1f} % |" in text
    assert len(report.rows([comparison])) == 1 + 5 * 3 * 2


def test_what_one_seed_shows_alone_is_not_told_among_all_seeds_and_variants(comparison):
    few, many = 9, 14  # McNemar's p 0.004 and 0.0001: times 5 comparisons of a pair, times 60 of the table
    assert compare(answered(0), answered(few))[0].verdict == "B is higher"
    more = {"sharing": 0, "eball": many}
    scores = {
        r["run"]: answered(more.get(variant, few)) for variant, results in comparison.results.items() for r in results
    }
    text = report.markdown("table2", [comparison], SCALES["cpu"].scope, scores)
    lines = dict(re.findall(r"^- (\w+ less sharing, seed \d): (.*)$", text, re.MULTILINE))
    assert len(lines) == 4 * 3
    told = {name for name, words in lines.items() if words != NO_DIFFERENCE}
    assert told == {f"eball less sharing, seed {seed}" for seed in range(3)}


def test_the_report_says_which_runs_lost_context(comparison):
    scores = {r["run"]: answered(0) for results in comparison.results.values() for r in results}
    assert "lost" not in report.markdown("table2", [comparison], SCALES["cpu"].scope, scores)
    for run, result in scores.items():
        result["truncated_requests"] = 7 if "seed0" in run else 8
    text = report.markdown("table2", [comparison], SCALES["cpu"].scope, scores)
    runs = ", ".join(f"m-{variant}-seed0" for variant in comparison.results)
    assert f"\n- {runs}: at most {T} tokens, 7 requests lost the beginning of their context\n" in text


def test_every_table_names_printed_rows_only():
    for name, table in TABLES.items():
        assert set(report.paper_order(name)) == {variant for variant, _ in table.rows}


def test_documents_of_a_sequence():
    assert held_out.document_lengths(np.array([5, 5, 0, 7, 0, 8, 8]), eos=0) == [3, 2, 2]
    assert held_out.document_lengths(np.array([0, 0, 3, 0]), eos=0) == [1, 1, 2]
    assert held_out.document_lengths(np.array([4, 4]), eos=0) == [2]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "reformer_lsh"])
def test_masks_are_compared_pair_by_pair(name):
    a, b = (VARIANTS[name].build(H, T, follows_input=kind) for kind in (False, True))
    for length in (3, 8, T):
        expected = bool((a.dense_mask(length) == b.dense_mask(length)).all())
        assert held_out.same_mask(a, b, length) == expected


def test_the_paper_s_sigma_comes_from_uniform_attention_at_256():
    found = {str(N): {name: appendix.uniform(name, N) for name in appendix.NAMES} for N in (128, 256)}
    assert appendix.matches({"uniform": found}) == [("256", "entropy_std")]
    masks = {name: VARIANTS[name].build(appendix.HEADS, 256).dense_mask().sum(-1).double() for name in appendix.NAMES}
    for name in ("dense", "sharing"):
        entropies = masks[name].log().mean(1)
        assert found["256"][name]["entropy"] == pytest.approx(float(entropies.mean()))
        assert found["256"][name]["diversity"]["entropy_std"] == pytest.approx(
            float(entropies.std(correction=0)), abs=1e-12
        )
