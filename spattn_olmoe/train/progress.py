"""What a run prints of its progress, and how fast it is."""

from __future__ import annotations

import logging
import math
import re
import time
from dataclasses import dataclass, field

from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.callbacks import ConsoleLoggerCallback, SpeedMonitorCallback
from olmo_core.train.common import TRAIN_CE_LOSS_METRIC as LOSS
from olmo_core.train.common import TrainingProgress
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from ..machine import peak_flops
from ..metrics import METRICS_FILE, read_metrics
from ..model.flops import flops_per_token
from . import output
from .metrics import run_folder
from .parts import model_parts

log = logging.getLogger(__name__)

SEPARATOR = " | "

MFU_IF_DENSE = "throughput/device/MFU as if dense (actual avg)"


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
        parts = model_parts(self.trainer.train_module)
        if self._dense_ratio is None and len(parts) == 1 and self._step_seq_len:  # a pipeline's stage is no whole model
            flops = flops_per_token(parts[0], self._step_seq_len)
            self._dense_ratio = flops.dense / flops.total
        return self._dense_ratio


@dataclass
class Progress(ConsoleLoggerCallback):
    """What a run shows of itself: a bar in a terminal, elsewhere one line for a step that is logged; a summary at the end.

    Held-out losses are those of OLMo-core's ``lm_evaluator``.
    """

    _bar: Bar | None = None
    _loss: float | None = None
    _held_out: dict[str, float] = field(default_factory=dict)
    _started: tuple[float, int] | None = None
    _failed: bool = False

    def pre_train(self) -> None:
        self._started = time.monotonic(), self.step
        if get_rank() == 0 and output.in_terminal():
            columns = MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[now]}")
            self._bar = Bar(*columns, console=output.console, expand=True, transient=True, refresh_per_second=2)
            self._bar.add_task("step", total=self.trainer.max_steps, completed=self.step, now="first step ...")
            self._bar.start()

    def post_step(self) -> None:
        if self._bar is not None:
            now = [*losses(self._loss, self._held_out), *speed(self.trainer.training_progress)]
            self._bar.update(TaskID(0), completed=self.step, now=SEPARATOR.join(now))

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if get_rank() != 0:
            return
        held_out = held_out_losses(metrics)
        self._loss, self._held_out = metrics.get(LOSS, self._loss), held_out or self._held_out
        if (self._should_log_metrics(step) and LOSS in metrics) or held_out:
            line = progress_line(step, metrics, self.trainer.training_progress)
            log.info(line, extra={"on_screen": self._bar is None})

    def on_error(self, exc: BaseException) -> None:
        self._failed = True

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if get_rank() == 0 and self._started is not None and not self._failed:
            log.info(self._summary(*self._started))

    def _summary(self, started: float, first: int) -> str:
        trainer, folder = self.trainer, run_folder(self.trainer)
        tps = trainer.training_progress.tps
        steps = f"step {self.step:,} of {trainer.max_steps:,}" if trainer.max_steps else f"step {self.step:,}"
        how = (
            "stopped at"
            if trainer.is_canceled
            else "done:"
            if self.step > first
            else "nothing left to train: already at"
        )
        took = f" in {duration(time.monotonic() - started)}" if self.step > first else ""
        speed = f", {tps * get_world_size():,.0f} tokens/s" if tps else ""
        vocabulary = next((part.vocab_size for part in model_parts(trainer.train_module)), None)
        return "\n".join(
            [
                f"{how} {steps}{took}{speed}",
                *summary_of_losses(read_metrics(folder), vocabulary),
                f"  checkpoints  {trainer.save_folder}/step*",
                f"  metrics      {folder / METRICS_FILE}",
                f"  messages     {folder / output.LOG_FILE}",
            ]
        )


def held_out_losses(metrics: dict[str, float]) -> dict[str, float]:
    """The held-out losses among a step's metrics, by the label of their data."""
    return {m[1]: value for key, value in metrics.items() if (m := re.fullmatch(r"eval/lm/(.+)/CE loss", key))}


def progress_line(step: int, metrics: dict[str, float], now: TrainingProgress) -> str:
    """A step's metrics as one line; what is not known is left out.

    :param now: speed and MFU, averaged over the run so far, and what remains.
    """
    lr = next((value for key, value in metrics.items() if key.startswith("optim/LR")), None)
    norm = metrics.get("optim/total grad norm")
    return SEPARATOR.join(
        [
            f"step {step}/{now.total_steps or '?'}",
            *losses(metrics.get(LOSS), held_out_losses(metrics)),
            *([f"lr {lr:.2e}"] if lr is not None else []),
            *([f"grad norm {norm:.3f}"] if norm is not None else []),
            *([f"MFU {now.mfu:.1f} %"] if now.mfu is not None else []),
            *([f"MFU as if dense {metrics[MFU_IF_DENSE]:.1f} %"] if MFU_IF_DENSE in metrics else []),
            *speed(now),
        ]
    )


def losses(loss: float | None, held_out: dict[str, float]) -> list[str]:
    """The losses that are known, each with its name."""
    label = "held-out {}".format if len(held_out) > 1 else lambda _: "held-out"
    known = {} if loss is None else {"loss": loss}
    known |= {label(name): value for name, value in held_out.items()}
    return [f"{name} {value:.4f}" for name, value in known.items()]


def speed(now: TrainingProgress) -> list[str]:
    """Tokens a second of all devices, and the time left: nothing before the second step."""
    parts = [f"{now.tps * get_world_size():,.0f} tokens/s"] if now.tps is not None else []
    if now.bps and now.total_steps and now.total_steps > now.current_step:
        parts.append(f"{duration((now.total_steps - now.current_step) / now.bps)} left")
    return parts


def duration(seconds: float) -> str:
    """A time in the unit that suits it: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def summary_of_losses(metrics: dict[int, dict[str, float]], vocabulary: int | None) -> list[str]:
    """Lines that say what the loss was first and last, beside that of a uniform guess, and the last held-out losses."""
    losses = [(step, values[LOSS]) for step, values in metrics.items() if LOSS in values]
    held_out = {label: (step, v) for step, values in metrics.items() for label, v in held_out_losses(values).items()}
    lines = []
    if losses:
        (first, before), (last, after) = losses[0], losses[-1]
        guess = f" (a uniform guess has ln {vocabulary} = {math.log(vocabulary):.3f})" if vocabulary else ""
        lines.append(f"  loss         {before:.3f} at step {first}{guess}, {after:.3f} at step {last}")
    lines += [f"  held-out     {value:.3f} at step {step} ({label})" for label, (step, value) in held_out.items()]
    return lines
