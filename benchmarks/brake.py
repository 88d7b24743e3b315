"""A callback that makes a run's steps take long, so that there is time for something to happen to it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_core.train.callbacks import Callback


@dataclass
class Brake(Callback):
    """Every step takes ``seconds`` longer while ``file`` is there. What is computed is the same."""

    file: str = ""
    seconds: float = 1.0

    def pre_step(self, batch: dict[str, Any]) -> None:
        if Path(self.file).exists():
            time.sleep(self.seconds)
