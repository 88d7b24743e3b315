"""Training in the stack ``ddp`` is training in v1, on one rank and on two, from the same weights.

Float32 shows it to rounding; pipelines compute in bfloat16 only, and are what one rank computes there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.layouts import DDP_LAYOUTS, DDP_STACK, FOUR_LAYERS, SMOOTH, difference, train
from benchmarks.tiny import tiny, write_data
from benchmarks.tiny_checkpoint import save
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.convert import convert
from spattn_olmoe.model.stack import Stack
from spattn_olmoe.patterns import VARIANTS

RUN = (*VARIANTS["sharing"].overrides, FOUR_LAYERS, "trainer.max_duration.value=3", "trainer.load_trainer_state=false")
PIPELINES = [name for name in DDP_LAYOUTS if name.startswith("pipeline")]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[Stack, Path]:
    """One model's random weights as a checkpoint of each stack."""
    folder = tmp_path_factory.mktemp("start")
    apply_remedies()
    config = tiny(*SMOOTH, *RUN, f"dataset.tokenizer.identifier={write_data(folder / 'data')}/tokenizer.json")
    described = config.model_with_attention()
    model, generator = described.build(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.1, generator=generator)
    v1 = folder / "v1" / "step0"
    save(v1, config, described, model)
    convert(Checkpoint.open(v1), folder / "ddp" / "step0", Stack.ddp)
    return {Stack.v1: v1, Stack.ddp: folder / "ddp" / "step0"}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, starts):
    """All runs by number of ranks, with one launch for each."""

    def of_ddp(*layout: str, float32: bool) -> dict:
        overrides = [*RUN, *DDP_STACK, *layout, f"trainer.load_path={starts[Stack.ddp]}"]
        return {"overrides": overrides, "ddp_in_float32": float32}

    one = {
        "v1": {"overrides": [*RUN, f"trainer.load_path={starts[Stack.v1]}"]},
        "ddp": of_ddp(float32=True),
        "ddp in bfloat16": of_ddp(float32=False),
    }
    two = {name: of_ddp(*layout, float32=name not in PIPELINES) for name, layout in DDP_LAYOUTS.items()}
    found = {}
    for n_ranks, runs in ((1, one), (2, two)):
        folder = tmp_path_factory.mktemp(f"ranks{n_ranks}")
        for i, run in enumerate(runs.values()):
            run["save_folder"] = str(folder / f"run{i}")  # without one nothing is loaded either
        found[n_ranks] = train(folder, n_ranks, runs)
    return found


def test_one_rank_is_v1(curves):
    assert len(curves[1]["v1"]) == 3
    assert curves[1]["v1"][0][0] > 4.3  # the weights of the start: new ones guess, with a loss of ln 64
    assert max(difference(curves[1]["v1"], curves[1]["ddp"])) < 1e-5


@pytest.mark.parametrize("layout", [name for name in DDP_LAYOUTS if name not in PIPELINES])
def test_two_ranks_are_v1_on_one(curves, layout):
    assert max(difference(curves[1]["v1"], curves[2][layout])) < 1e-5


@pytest.mark.parametrize("layout", PIPELINES)
def test_a_pipeline_is_one_rank(curves, layout):
    loss, norm, balance = difference(curves[1]["ddp in bfloat16"], curves[2][layout])
    assert loss == 0 and norm < 1e-6 and balance < 1e-6
    assert difference(curves[1]["v1"], curves[2][layout])[0] < 1e-3
