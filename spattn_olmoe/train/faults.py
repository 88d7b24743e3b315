"""Fault handling: signals, bad steps, failed evaluations, lost ranks."""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.optim.moe_optimizer import OLMoDDPOptimizer
from olmo_core.train import Trainer, teardown_training_environment
from olmo_core.train.callbacks import Callback, EvaluatorCallback
from olmo_core.train.common import OPTIM_GRAD_NORM_METRIC, TRAIN_CE_LOSS_METRIC, ReduceType
from olmo_core.utils import cuda_sync_debug_mode
from torch.distributed.elastic.multiprocessing.errors import record

from ..errors import fail
from ..exit_code import keep
from .checkpoints import SaveError
from .finite import find_non_finite

log = logging.getLogger(__name__)

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that are no defect: no room, no quota, a disk that may not be written."""

SKIPPED_METRIC = "optim/step skipped"


# ---- the end of a run ------------------------------------------------------------------------------------------------


def fit(trainer: Trainer) -> int:
    """Train to the end, to a signal or to an error.

    :returns: the exit status of the process: 0 at the end of the run, 128 + its number if a signal ended it before that,
        with a checkpoint saved. An error is raised; on one of several ranks it ends the process at once.
    """
    signal.signal(signal.SIGTERM, functools.partial(_outside_the_steps, trainer))
    trainer._dry_run_batch = functools.partial(_interruptible, trainer, trainer._dry_run_batch)  # type: ignore[method-assign]
    try:
        record(trainer.fit)()  # tells the launcher what failed, so that it can name the first of many failures
    except SystemExit:
        raise
    except BaseException as error:
        line = _no_defect(error, trainer)
        if get_world_size() == 1:
            if line:
                fail(line, 1)
            raise
        # Background threads may be blocked on other ranks, so a normal exit could hang. Exit hard; the launcher then
        # stops the other ranks.
        if line:
            print(f"error: rank {get_rank()}: {line}", file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        keep(1)
        os._exit(1)
    teardown_training_environment()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if trainer.is_canceled and trainer._cancel_reason == f"{number.name} received":
            log.warning(
                "ended by %s at step %d: start the same command again to resume", number.name, trainer.global_step
            )
            return 128 + number
    return 0


def _no_defect(error: BaseException, trainer: Trainer) -> str | None:
    """What to tell of an error that is none of the program: a checkpoint that cannot be saved, a full disk."""
    if isinstance(error, SaveError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        advice = "make room, then start the same command again to resume"
        return f"cannot write in {trainer.save_folder} ({error.strerror}): {advice}"
    return None


def _outside_the_steps(trainer: Trainer, number: int, frame: FrameType | None) -> None:
    """SIGTERM where the trainer does not handle it: before the first step it ends the process, after the last
    it is ignored until the run has ended.

    A launcher and a cluster may both send it, and the second one must not end the process while it saves.
    """
    ends = [end for end in (trainer.max_duration, trainer.hard_stop) if end is not None]
    if not trainer.is_canceled and not any(trainer._duration_due(end) for end in ends):
        sys.exit(128 + number)


def _interruptible(trainer: Trainer, dry_run_batch: Callable[[], None]) -> None:
    """The dry run of a batch, which may take minutes: signals end the process there, since nothing is there to save.

    From then on a lost terminal (SIGHUP) is what SIGTERM is: the run saves and ends. Under ``nohup`` it stays ignored.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        dry_run_batch()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, functools.partial(_hang_up, trainer))


def _hang_up(trainer: Trainer, number: int, frame: FrameType | None) -> None:
    trainer.cancel_run("SIGHUP received")


# ---- bad steps -------------------------------------------------------------------------------------------------------


@dataclass
class SkipNonFinite(Callback):
    """Leaves out the optimiser step wherever the gradient is NaN or infinite, so that no weight ever is.

    The norm of the gradient over all ranks tells, after which all of them decide alike. A skipped step moves neither
    weights nor moments; its batch is passed over. It is logged as ``optim/step skipped`` instead of a loss.

    :param stop_after: end the run with an error after so many skipped steps in a row.
    """

    enabled: bool = True
    stop_after: int = 10
    _in_a_row: int = 0

    def __post_init__(self) -> None:
        if self.stop_after < 1:
            raise ValueError(f"trainer.callbacks.skip_non_finite.stop_after={self.stop_after} must be at least 1")

    def pre_train(self) -> None:
        if self.enabled:
            optim = getattr(self.trainer.train_module, "optim")  # noqa: B009  of all train modules but the base class
            optim.register_step_pre_hook(self._drop_bad_gradients)

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row = state_dict.get("in_a_row", 0)

    def _drop_bad_gradients(self, optim: Any, args: Any, kwargs: Any) -> None:
        of_ddp = isinstance(
            optim, OLMoDDPOptimizer
        )  # which takes the norm as part of a step, and logs what was skipped
        norm = optim.latest_grad_norm if of_ddp else self.trainer.get_metric(OPTIM_GRAD_NORM_METRIC)
        if norm is None:  # the dry run before the first step
            return
        with cuda_sync_debug_mode(0):
            finite = math.isfinite(norm.item())
        if finite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        optim.zero_grad(set_to_none=True)  # an optimiser leaves parameters without a gradient as they are
        # OLMo-core ends a run at a loss that is not finite.
        self.trainer._metrics[self.step].pop(TRAIN_CE_LOSS_METRIC, None)
        if not of_ddp:
            self.trainer.record_metric(SKIPPED_METRIC, 1.0, reduce_type=ReduceType.max)
        if get_rank() == 0:
            log.warning(
                "step %d skipped: the gradient's norm is %s (%d in a row)", self.step, norm.item(), self._in_a_row
            )

    def post_step(self) -> None:
        if self._in_a_row >= self.stop_after:
            raise FloatingPointError(
                f"steps {self.step - self._in_a_row + 1} to {self.step} had no finite gradient: stopped after "
                f"skip_non_finite.stop_after={self.stop_after} of them in a row. {self._weights()} "
                "Lower train_module.optim.lr, or leave out these steps with trainer.steps_to_skip, and start again"
            )

    def _weights(self) -> str:
        problem = find_non_finite(self.trainer.train_module)
        if problem is None:
            return "Weights and moments are finite: they were looked at."
        return f"But {problem} is not finite, so nothing is saved: the run goes back to its newest checkpoint."


# ---- evaluations in the loop -----------------------------------------------------------------------------------------


def survive_evaluations(trainer: Trainer) -> None:
    """Continue training where an evaluation in the loop raises, with the traceback in the log."""
    for callback in trainer.callbacks.values():
        if isinstance(callback, EvaluatorCallback):
            callback.perform_eval = functools.partial(_evaluate, callback.perform_eval)  # type: ignore[method-assign]


def _evaluate(evaluate: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    try:
        evaluate(*args, **kwargs)
    except Exception:  # an evaluation must not cost a run; a rank that fails alone is waited for, and then times out
        log.exception(
            "evaluation failed; training continues without its metrics (trainer.no_evals=true turns evaluations off)"
        )


# ---- signals ---------------------------------------------------------------------------------------------------------


@dataclass
class ShieldDataWorkers(Callback):
    """Keeps SIGTERM from data workers: a launcher sends it to them too, and the run needs them to finish its step.

    Processes inherit the signals that are blocked while they are started. Workers end when their run does.
    """

    priority: ClassVar[int] = -100

    def pre_load_batch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

    def pre_step(self, batch: dict[str, Any]) -> None:
        self._unblock()

    def post_epoch(self) -> None:
        self._unblock()

    @staticmethod
    def _unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
