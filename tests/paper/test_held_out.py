"""What is measured on held-out text while a run trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from spattn_olmoe.commands import ROOT
from spattn_olmoe.paper.held_out import curve, in_loop


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        ("/data/train-web/train-*.bin", "/data/train-web/validation-*.bin"),
        ("s3://train-web/train-*.bin", "s3://train-web/validation-*.bin"),
        ("train-*.bin", "validation-*.bin"),
    ],
)
def test_held_out_shards_lie_in_the_training_shards_folder_whatever_it_is_called(training: str, held_out: str):
    words = in_loop(ROOT / "configs/reproduce/cpu.yaml", [f"dataset.paths=['{training}']"], 5)
    assert words[-1].endswith(f".eval_dataset.paths=[{held_out}]")


def test_a_run_without_a_curve_is_one_line(tmp_path: Path):
    for content in (None, '{"step": 1, "train/CE loss": 5.0}\n'):
        if content:
            (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl has no held-out losses: remove .* and run again"):
            curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/lm/validation/CE loss": 7.5}\n')
    assert curve(tmp_path) == {0: 7.5}
