"""Training in the stack ``ddp`` is training in v1, on one rank and on several, from the same weights.

Float32 shows it to rounding; pipelines compute in bfloat16 only, and are what one rank computes there.
"""

from __future__ import annotations

import pytest

from benchmarks.layouts import DDP_LAYOUTS, BothStacks, difference, in_bfloat16
from spattn_olmoe.paper.same_start import read_start

TESTED = {
    1: tuple(DDP_LAYOUTS[1]),
    2: tuple(DDP_LAYOUTS[2]),
    4: ("ddp+ep+ulysses, experts over 4", "pipeline+ddp 2x2, V"),
}
CASES = [(n_ranks, name) for n_ranks, names in TESTED.items() for name in names]
PIPELINES = [case for case in CASES if in_bfloat16(case[1])]


RECORD = "trainer.callbacks.start_record._CLASS_=spattn_olmoe.paper.same_start.StartRecord"


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> BothStacks:
    return BothStacks(tmp_path_factory.mktemp("ddp"), "trainer.max_duration.value=3", RECORD)


@pytest.fixture(scope="module")
def curves(stacks: BothStacks):
    """All runs by number of ranks, with one launch for each."""
    return {n: stacks.train(n, {name: DDP_LAYOUTS[n][name] for name in names}) for n, names in TESTED.items()}


def test_the_runs_begin_with_the_weights_they_load(curves):
    assert len(curves[1]["v1"]) == 3
    assert curves[1]["v1"][0][0] > 4.3  # new weights guess, with a loss of ln 64


@pytest.mark.parametrize(("n_ranks", "layout"), [case for case in CASES if case not in PIPELINES])
def test_a_layout_is_v1_on_one_rank(curves, n_ranks, layout):
    assert max(difference(curves[1]["v1"], curves[n_ranks][layout])) < 1e-5


@pytest.mark.parametrize(("n_ranks", "layout"), PIPELINES)
def test_a_pipeline_is_one_rank(curves, n_ranks, layout):
    loss, norm, balance = difference(curves[1]["bfloat16"], curves[n_ranks][layout])
    assert loss <= (0 if n_ranks == 2 else 1e-6)  # four ranks sum in another order
    assert norm < 1e-6 and balance < 1e-6
    assert difference(curves[1]["v1"], curves[n_ranks][layout])[0] < 1e-3


def test_the_record_of_a_start_is_of_all_that_ranks_hold(curves, stacks):
    """Of the whole model where every rank has it; of all parts where experts and stages lie on one rank each."""
    weights = {run: read_start(folder)["weights"] for run, folder in stacks.runs.items()}
    assert weights[2, "ddp"] == weights[2, "ddp+ulysses"] == weights[1, "ddp"]
    parts = [weights[2, name] for name in ("ddp", "ddp+ep", "pipeline", "pipeline, V")]
    assert len(set(parts)) == 4
    assert weights[2, "ddp+ep"] == weights[2, "ddp+ep+ulysses"]
