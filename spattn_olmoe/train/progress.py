"""Callbacks of a run: progress, throughput, metrics in a file, Weights & Biases, and small files beside checkpoints."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from olmo_core.aliases import PathOrStr
from olmo_core.distributed.utils import get_rank
from olmo_core.io import is_url
from olmo_core.train.callbacks import Callback, ConsoleLoggerCallback, SpeedMonitorCallback, WandBCallback
from olmo_core.utils import format_timedelta

from ..model.flops import flops_per_token

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

MFU_IF_DENSE = "throughput/device/MFU as if dense (actual avg)"

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, first match counts. Source: NVIDIA's data sheets, without sparsity."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass
class Throughput(SpeedMonitorCallback):
    """Tokens per second and two MFUs: of the work actually done, and as if attention were dense.

    An unknown device has no MFU, where OLMo-core's callback would assume an A100.
    """

    _dense_ratio: float | None = None

    def pre_train(self) -> None:
        stated = self.device_peak_flops_per_second
        super().pre_train()
        known = peak_flops(self.trainer.device)
        half_precision = self.device_peak_flops_per_second is not None
        self.device_peak_flops_per_second = stated or (int(known) if known and half_precision else None)

    def post_step(self) -> None:
        super().post_step()
        if self._mfu_avg is not None and (ratio := self._ratio()) is not None:
            self.trainer.record_metric(MFU_IF_DENSE, self._mfu_avg * ratio)

    def _ratio(self) -> float | None:
        """FLOPs of the dense model over those of this one, at the length of the latest batch."""
        model = getattr(self.trainer.train_module, "model", None)
        if self._dense_ratio is None and model is not None and self._step_seq_len:
            flops = flops_per_token(model, self._step_seq_len)
            self._dense_ratio = flops.dense / flops.total
        return self._dense_ratio


@dataclass
class Progress(ConsoleLoggerCallback):
    """One line a step that is logged: loss, learning rate, gradient norm, tokens/s, both MFUs, time left.

    :param verbose: OLMo-core's own block of metrics instead.
    """

    verbose: bool = False

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if self.verbose:
            super().log_metrics(step, metrics)
        elif self._should_log_metrics(step) and "train/CE loss" in metrics:
            now = self.trainer.training_progress
            eta = format_timedelta(now.time_remaining).replace(", ", " ") if now.time_remaining is not None else "-"
            log.info(progress_line(step, self.trainer.max_steps, metrics, tps=now.tps, mfu=now.mfu, eta=eta))

    def post_step(self) -> None:
        if self.verbose:
            super().post_step()


def progress_line(
    step: int, max_steps: int | None, metrics: dict[str, float], *, tps: float | None, mfu: float | None, eta: str
) -> str:
    """A step's metrics as one line; "n/a" for what is not known.

    :param tps: tokens per second of one device, averaged over the run so far.
    :param mfu: model FLOPs utilisation of the work actually done, in percent, averaged likewise.
    """

    def number(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    lr = next((value for key, value in metrics.items() if key.startswith("optim/LR")), None)
    return " | ".join(
        [
            f"step {step}/{max_steps or '?'}",
            f"loss {number(metrics.get('train/CE loss'), '.4f')}",
            f"lr {number(lr, '.2e')}",
            f"grad norm {number(metrics.get('optim/total grad norm'), '.3f')}",
            f"{number(tps, ',.0f')} tokens/s per device",
            f"MFU {number(mfu, '.1f')} % (as if dense {number(metrics.get(MFU_IF_DENSE), '.1f')} %)",
            f"ETA {eta}",
        ]
    )


@dataclass
class MetricsFile(Callback):
    """All metrics of every step, one JSON object a line, in ``metrics.jsonl`` in the run's folder.

    A step may have several lines with different metrics; :func:`read_metrics` puts them together. On resume, lines of
    steps that will be computed again are dropped, so that the file is that of an uninterrupted run.
    """

    priority: ClassVar[int] = 4

    @property
    def path(self) -> Path:
        """The file; beside the checkpoints, or in the working directory where those go to a URL."""
        folder = self.trainer.work_dir if is_url(self.trainer.save_folder) else Path(self.trainer.save_folder)
        return folder / METRICS_FILE

    def pre_train(self) -> None:
        if get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_steps(self.path, up_to=self.step)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if get_rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")


def keep_steps(path: Path, up_to: int) -> None:
    """Drop the lines of a metrics file that are broken or of later steps than ``up_to``, all or nothing."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (step := _step_of(line)) is not None and step <= up_to]
    new = path.with_suffix(".tmp")
    new.write_text("".join(f"{line}\n" for line in kept))
    new.replace(path)


def _step_of(line: str) -> int | None:
    """The step of a line of a metrics file; None for one that was cut off as it was written."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def read_metrics(folder: str | Path) -> dict[int, dict[str, float]]:
    """The metrics of a run by step, in order of steps."""
    by_step: dict[int, dict[str, float]] = {}
    for line in (Path(folder) / METRICS_FILE).read_text().splitlines():
        if (step := _step_of(line)) is not None:
            by_step.setdefault(step, {}).update({k: v for k, v in json.loads(line).items() if k != "step"})
    return dict(sorted(by_step.items()))


@dataclass
class WandB(WandBCallback):
    """Weights & Biases that never stops a run.

    Without an API key it logs offline (``wandb sync`` uploads later), without the package not at all, each said once.
    A run that is resumed stays one run: its id is kept in the save folder. Once wandb fails, training goes on without.

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
        log.warning("wandb is off for the rest of this run: %s. Metrics go on to %s.", why, METRICS_FILE)


@dataclass
class CheckpointFiles(Callback):
    """Writes small files into the run's folder and into every checkpoint: what it takes to use one by itself.

    :param files: contents by file name.
    """

    files: dict[str, str] = field(default_factory=dict)

    def pre_train(self) -> None:
        # A crash between a checkpoint and its files leaves the run's own to go by.
        self._write(self.trainer.save_folder)

    def post_checkpoint_saved(self, path: PathOrStr) -> None:
        self._write(path)

    def _write(self, folder: PathOrStr) -> None:
        if get_rank() == 0:
            for name, contents in self.files.items():
                self.trainer.write_file(name, contents, dir=folder)
