"""What is planned to learn what conversion costs, and what is reported."""

from __future__ import annotations

import pytest

from spattn_olmoe.commands import ROOT
from spattn_olmoe.machine import describe
from spattn_olmoe.paper import conversion
from spattn_olmoe.paper.conversion import AFTER, BEFORE, MASKS, SCRATCH

CONFIG = ROOT / "configs" / "reproduce" / "cpu.yaml"


def test_all_continuations_start_from_the_dense_model_and_see_one_order(tmp_path):
    stages = conversion.plan(CONFIG, seeds=1, out=tmp_path, overrides=["trainer.max_duration.value=9"])
    (parent,) = stages[BEFORE]
    before, after = parent.experiment(), [run.experiment() for run in stages[AFTER]]
    assert [e.attention["type"] for e in after] == ["standard", *["spattention"] * 3]
    assert [e.attention["layers"] for e in after] == [*["all"] * 3, "dense_last"]
    assert {e.trainer.load_path for e in after} == {str(parent.folder)}
    assert all(e.allow_attention_change and e.trainer.load_optim_state is False for e in after)
    orders = {e.data_loader.seed for e in after}
    assert len(orders) == 1 and before.data_loader.seed not in orders
    lengths = [e.trainer.max_duration.value for e in (before, *after, stages[SCRATCH][0].experiment())]
    assert lengths == [4, 5, 5, 5, 5, 9]
    runs = [run for one in stages.values() for run in one]
    assert len({run.folder for run in runs}) == len({run.name for run in runs}) == len(runs) == 9


def test_the_report_pairs_differences_by_seed():
    def curves(*ends):
        return [{0: 5.0, 50: end + 1, 100: end} for end in ends]

    after = {mask: curves(3.0 + n / 10, 3.5 + n / 10) for n, mask in enumerate(MASKS)}
    results = {
        "machine": describe("cpu"),
        "switch": 100,
        "curves": {
            BEFORE: {"dense": curves(4.0, 4.1)},
            AFTER: after,
            SCRATCH: dict.fromkeys(MASKS, curves(3.25, 3.75)),
        },
    }
    text = conversion.markdown(results)
    assert "trained on 100 tokens and continued on 100 more" in text
    cells = "5.0000 +- 0.0000 | 4.3500 +- 0.3536 | 3.3500 +- 0.3536 | 0.1000 +- 0.0000 | 3.5000 +- 0.3536"
    assert f"| `sharing` | {cells} |" in text
    assert len(conversion.picture(results).axes[0].lines) == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scale", "paper"), "conversion --scale paper: the paper has no such experiment; use --scale cpu or gpu"),
        (
            ("--variants", "eball"),
            "--variants eball: conversion has its own (dense, sharing, exclusive, sharing/dense_last)",
        ),
        (
            ("--dry-run", "trainer.max_duration.value=1"),
            "trainer.max_duration.value=1: conversion needs 2 steps or more, one before the switch",
        ),
    ],
)
def test_what_it_cannot_do_gets_one_line(reproduce, words, said):
    code, _, error = reproduce("conversion", *words)
    assert (code, error) == (2, f"error: {said}\n")
