"""What a run prints of its progress, and how fast it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from olmo_core.train.callbacks import ConsoleLoggerCallback, SpeedMonitorCallback
from olmo_core.utils import format_timedelta

from ..machine import peak_flops
from ..model.flops import flops_per_token

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

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
