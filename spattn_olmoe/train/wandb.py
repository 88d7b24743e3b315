"""Weights & Biases as an extra that cannot stop a run."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import WandBCallback

from ..metrics import METRICS_FILE

log = logging.getLogger(__name__)


@dataclass
class WandB(WandBCallback):
    """Weights & Biases that never stops a run.

    Without an API key it logs offline (``wandb sync`` uploads later), without the package not at all, with one line about it.
    A run that is resumed stays one run: its id is kept in the save folder. Once wandb fails, training continues without.

    :param mode: ``auto`` (online with a key, else offline), ``online``, ``offline`` or ``disabled``.
    """

    mode: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"trainer.callbacks.wandb.mode={self.mode!r}: must be auto, online, offline or disabled")

    def pre_train(self) -> None:
        if not self.enabled or get_rank() != 0:
            return
        if self.mode == "disabled":
            self.enabled = False
        elif importlib.util.find_spec("wandb") is None:
            self._give_up("the wandb package is not installed (pip install wandb)")
        else:
            with self._never_fatal("start"):
                self._start()

    def _start(self) -> None:
        mode = self.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            log.info("wandb logs %s%s", mode, "" if mode == "online" else ": WANDB_API_KEY is not set")
        folder = self.trainer.work_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "run_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        self.wandb.init(
            id=run_id,
            resume="allow",
            mode=mode,
            dir=folder,
            project=self.project or "spattn_olmoe",
            entity=self.entity,
            group=self.group,
            name=self.name,
            tags=self.tags,
            notes=self.notes,
            config=self.config,
        )
        self._run_path = self.run.path

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        with self._never_fatal("log"):
            super().log_metrics(step, metrics)

    def post_step(self) -> None:
        if os.environ.get("WANDB_API_KEY"):  # looking for cancel tags takes the API
            super().post_step()

    def check_if_canceled(self) -> None:
        with self._never_fatal("look for cancel tags"):
            super().check_if_canceled()

    def finalize(self, exit_code: int = 0) -> None:
        if not self._finalized:
            self._finalized = True
            with self._never_fatal("finish"):
                self.wandb.finish(exit_code=exit_code)

    def on_error(self, exc: BaseException) -> None:
        if self._running():
            self.finalize(exit_code=1)

    def close(self) -> None:
        if self._running():
            self.finalize()

    def _running(self) -> bool:
        return self.enabled and get_rank() == 0 and self._wandb is not None and self.run is not None

    @contextlib.contextmanager
    def _never_fatal(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises, weeks of training must not end with it
            self._give_up(f"it failed to {what}: {type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        self.enabled = False
        log.warning("wandb is off for the rest of this run: %s. Metrics are still written to %s.", why, METRICS_FILE)
