"""The metrics of a run, written to a file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from olmo_core.distributed.utils import get_rank
from olmo_core.io import is_url
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback

from ..json_files import to_json
from ..metrics import METRICS_FILE, keep_steps


def run_folder(trainer: Trainer) -> Path:
    """The local folder of a run: beside the checkpoints, or the working directory where those go to a URL."""
    return trainer.work_dir if is_url(trainer.save_folder) else Path(trainer.save_folder)


@dataclass
class MetricsFile(Callback):
    """All metrics of every step, one JSON object a line, in ``metrics.jsonl`` in the run's folder.

    A step may have several lines with different metrics; :func:`.read_metrics` puts them together. On resume, lines of
    steps that will be computed again are dropped, so that the file is that of an uninterrupted run.
    """

    priority: ClassVar[int] = 4

    @property
    def path(self) -> Path:
        """The file, in :func:`run_folder`."""
        return run_folder(self.trainer) / METRICS_FILE

    def pre_train(self) -> None:
        if get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_steps(self.path, up_to=self.step)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if get_rank() == 0:
            with self.path.open("a") as file:
                file.write(to_json({"step": step, "time": time.time(), **metrics}) + "\n")
