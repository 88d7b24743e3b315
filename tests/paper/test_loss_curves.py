"""Loss curves as pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from spattn_olmoe.paper.figures import save_figure
from spattn_olmoe.paper.loss_curves import LOSS, plot_losses


def run(folder: Path, losses: list[float | None]) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": i, "time": 0.0, LOSS: value}) for i, value in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "train/CE lo']))
    return folder


def coloured(path: Path) -> int:
    """Pixels of the first curve's blue."""
    image = imread(path)[..., :3]
    return int((np.abs(image - np.array([0x1F, 0x77, 0xB4]) / 255).max(-1) < 0.1).sum())


def test_a_run_of_one_step_is_seen(tmp_path: Path) -> None:
    plot_losses([run(tmp_path / "r", [7.6])], tmp_path / "one.png")
    plot_losses([run(tmp_path / "s", [None])], tmp_path / "none.png")
    assert coloured(tmp_path / "one.png") > coloured(tmp_path / "none.png") + 10


@pytest.mark.parametrize("name", ["$x^{$", "_hidden", "a\\b", "line\nbreak"])
def test_a_folders_name_is_no_formula(name: str, tmp_path: Path) -> None:
    plot_losses([run(tmp_path / name, [3.0, 2.0])], tmp_path / "out.svg")
    assert (tmp_path / "out.svg").stat().st_size > 1000


@pytest.mark.parametrize("out", ["", ".", "/dev/full", "a.txt", "png"])
def test_a_picture_has_a_pictures_ending(out: str) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_figure(Figure(), out, dpi=50)


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "precious.png").write_text("precious")
    (tmp_path / "out.png").symlink_to(tmp_path / "precious.png")
    save_figure(Figure(), tmp_path / "out.png", dpi=50)
    assert (tmp_path / "precious.png").read_text() == "precious"
    assert not (tmp_path / "out.png").is_symlink()
