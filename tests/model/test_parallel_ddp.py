"""Training in the stack ``ddp`` is training in v1, on one rank and on several, from the same weights.

Float32 shows it to rounding. In bfloat16, as the stack computes, a pipeline is one rank to the bit.
"""

from __future__ import annotations

import pytest

from benchmarks.layouts import DDP_LAYOUTS, BothStacks, difference, rounded
from spattn_olmoe.paper.same_start import read_start

TESTED = {
    1: tuple(DDP_LAYOUTS[1]),
    2: tuple(DDP_LAYOUTS[2]),
    4: ("ddp+ep+ulysses, experts over 4", "pipeline+ddp 2x2, V", "pipeline+ep+ulysses, V"),
}
IN_BFLOAT16 = {1: ("ddp",), 2: ("pipeline", "pipeline, V"), 4: ()}
CASES = [(n_ranks, name) for n_ranks, names in TESTED.items() for name in names]
RECORD = "trainer.callbacks.start_record._CLASS_=spattn_olmoe.paper.same_start.StartRecord"


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> BothStacks:
    return BothStacks(tmp_path_factory.mktemp("ddp"), "trainer.max_duration.value=3", RECORD)


@pytest.fixture(scope="module")
def curves(stacks: BothStacks):
    """All runs by number of ranks, with one launch for each."""
    return {n: stacks.train(n, names, IN_BFLOAT16[n]) for n, names in TESTED.items()}


def test_the_runs_begin_with_the_weights_they_load(curves):
    assert len(curves[1]["v1"]) == 3
    assert curves[1]["v1"][0][0] > 4.3  # new weights guess, with a loss of ln 64


@pytest.mark.parametrize(("n_ranks", "layout"), CASES)
def test_a_layout_is_v1_on_one_rank(curves, n_ranks, layout):
    assert max(difference(curves[1]["v1"], curves[n_ranks][layout])) < 1e-5


def test_a_pipeline_in_bfloat16_is_one_rank(curves):
    one = curves[1][rounded("ddp")]
    for layout in IN_BFLOAT16[2]:
        loss, norm, balance = difference(one, curves[2][rounded(layout)])
        assert loss == 0 and norm < 1e-6 and balance < 1e-6
    assert 1e-6 < difference(curves[1]["v1"], one)[0] < 1e-3  # it is bfloat16


def test_the_record_of_a_start_is_of_all_that_ranks_hold(curves, stacks):
    """Of the whole model where every rank has it; of all parts where experts and stages lie on one rank each."""
    weights = {run: read_start(folder)["weights"] for run, folder in stacks.runs.items()}
    assert weights[2, "ddp"] == weights[2, "ddp+ulysses"] == weights[1, "ddp"]
    parts = [weights[2, name] for name in ("ddp", "ddp+ep", "pipeline", "pipeline, V")]
    assert len(set(parts)) == 4
    assert weights[2, "ddp+ep"] == weights[2, "ddp+ep+ulysses"]
