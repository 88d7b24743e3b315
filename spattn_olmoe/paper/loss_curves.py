"""Loss curves of runs, from their metrics files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..metrics import METRICS_FILE, read_metrics
from ..text import figure_text
from .figures import check_out, save_figure

LOSS = "train/CE loss"


def loss_curve(run: str | Path) -> tuple[list[int], list[float]]:
    """Steps and training losses (nats a token) of a run.

    :raises ValueError: the folder holds no metrics, or no loss among them.
    """
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {run} is not the folder of a run")
    points = [(step, metrics[LOSS]) for step, metrics in read_metrics(run).items() if LOSS in metrics]
    if not points:
        raise ValueError(f"{path} holds no {LOSS!r} yet: train at least one step")
    steps, losses = zip(*points, strict=True)
    return list(steps), list(losses)


def plot_losses(runs: Sequence[str | Path], out: str | Path) -> None:
    """Draw the loss curves of runs into one picture; the format follows the file's ending."""
    check_out(out)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        steps, losses = loss_curve(run)
        # a line of one point would not be seen; a name with a dollar or an underscore is no formula
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, losses, label=figure_text(Path(run).name), linewidth=1.2, marker=marker)
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, out, dpi=150)
