"""What is measured on held-out text while a run trains."""

from __future__ import annotations

from spattn_olmoe.commands import ROOT
from spattn_olmoe.paper.held_out import in_loop


def test_held_out_shards_lie_in_the_training_shards_folder_whatever_it_is_called():
    words = in_loop(ROOT / "configs/reproduce/cpu.yaml", ["dataset.paths=[/data/train-web/train-*.bin]"], 5)
    assert words[-1].endswith(".eval_dataset.paths=[/data/train-web/validation-*.bin]")
    (run,) = [word for word in in_loop(ROOT / "configs/reproduce/cpu.yaml", [], 5) if "paths" in word]
    assert run.endswith("paths=[data/reproduce_cpu/shards/validation-*.bin]")
