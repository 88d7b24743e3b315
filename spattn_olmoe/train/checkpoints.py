"""Saving checkpoints: what is written beside the weights, and what is printed where one cannot be saved."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo_core.aliases import PathOrStr
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.exceptions import OLMoCheckpointError
from olmo_core.io import is_url, normalize_path
from olmo_core.train import Checkpointer
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ..json_files import read_json
from .finite import find_non_finite


class SaveError(OLMoCheckpointError):
    """A checkpoint could not be saved: which, why, and what to do."""


@dataclass
class SafeCheckpointer(CheckpointerCallback):
    """OLMo-core's checkpointer, which names the remedy where a checkpoint cannot be saved, and saves no NaN.

    The run ends then, for it would train on without a net. Earlier checkpoints are not touched.

    A checkpoint that the run was resumed from is its newest: the same step is not saved again, since a folder is cleared
    before it is written, and whatever ended the run in between would cost the checkpoint.

    What a signal makes a run save is temporary: the run that resumes from it removes it once it has saved the next.
    """

    def post_checkpoint_loaded(self, path: PathOrStr) -> None:
        if is_own(self.save_folder, path):
            self._latest_checkpoint_step, self._latest_checkpoint_path = self.step, str(path)

    def pre_train(self) -> None:
        self._resumed_at = self._latest_checkpoint_step
        super().pre_train()
        logging.getLogger("concurrent.futures").addFilter(_not_raised_later)
        self._after_signals: list[str] = []
        if self.enabled and self.remove != CheckpointRemovalStrategy.never and not is_url(self.save_folder):
            permanent, self._after_signals = broadcast_object(self._earlier() if get_rank() == 0 else ([], []))
            self._checkpoints = permanent + self._checkpoints  # else max_checkpoints would count each start's anew

    def _earlier(self) -> tuple[list[str], list[str]]:
        """Checkpoints of earlier starts up to this step, oldest first: permanent ones, and temporary ones that OLMo-core
        does not know by their step."""
        known = {*self._checkpoints, *self._ephemeral_checkpoints}
        found = sorted(self.checkpointer.find_checkpoints(self.save_folder))
        paths = [str(path) for step, path in found if step <= self.step and str(path) not in known]
        temporary = [path for path in paths if _is_temporary(path)]
        return [path for path in paths if path not in temporary], temporary

    def post_train_batch(self) -> None:
        super().post_train_batch()
        self._drop_those_after_signals()

    def post_train(self) -> None:
        stopped = self.trainer.is_canceled and not self.trainer._duration_due(self.trainer.max_duration)
        if self.enabled and stopped and self.step > self._latest_checkpoint_step:
            self._save_checkpoint(save_async=False, ephemeral=True)
        super().post_train()
        self._drop_those_after_signals()
        self._remove_old_checkpoints()  # OLMo-core does so with the next step, which a last save has none of

    def _drop_those_after_signals(self) -> None:
        """Schedule the temporary checkpoints of earlier runs for removal, which waits until the newest save is finished."""
        if self._latest_checkpoint_step > self._resumed_at:
            for path in self._after_signals:
                self._schedule_for_removal(path)
            self._after_signals = []

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> str:
        if self.step == self._latest_checkpoint_step:
            return self._latest_checkpoint_path
        step = f"{self.save_folder}/{self.checkpointer.checkpoint_dirname(self.step)}"
        if (problem := find_non_finite(self.trainer.train_module)) is not None:
            raise SaveError(
                f"{step} is not saved: {problem} is not finite. Earlier checkpoints are: start the same command again to go "
                "back to the newest, with a lower train_module.optim.lr or a smaller train_module.max_grad_norm"
            )
        return self._saving(step, functools.partial(super()._save_checkpoint, *args, **kwargs))

    def _await_last_checkpoint(self, blocking: bool = True) -> Future | None:
        return self._saving(
            self._latest_checkpoint_path, lambda: super(SafeCheckpointer, self)._await_last_checkpoint(blocking)
        )

    def _saving(self, path: str, save: Callable[[], Any]) -> Any:
        try:
            return save()
        except SaveError:
            raise
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            raise SaveError(f"{path} could not be saved: {_cause(error)}. {self._advice()}") from error

    def _advice(self) -> str:
        free = ""
        if not is_url(self.save_folder):
            free = f"{shutil.disk_usage(self.save_folder).free / 2**30:.1f} GiB are free in {self.save_folder}. "
        return (
            f"{free}Earlier checkpoints are intact, and the same command resumes from the newest. If space (or quota) was "
            "lacking, free some first, or copy the newest into another trainer.save_folder"
        )


def is_own(save_folder: PathOrStr, checkpoint: PathOrStr) -> bool:
    """Whether a checkpoint is one of the run that writes a folder, however the two are spelled."""
    folder, checkpoint = str(normalize_path(save_folder)), str(normalize_path(checkpoint))
    if is_url(folder) or is_url(checkpoint):
        return checkpoint.rpartition("/")[0] == folder.rstrip("/")
    return Path(checkpoint).parent.resolve() == Path(folder).resolve()


def _cause(error: BaseException) -> str:
    """What went wrong, in a line, through the wrappers of torch.distributed.checkpoint and OLMo-core's writer."""
    failures = getattr(error, "failures", None)
    if failures:  # by rank: the exception and its traceback
        rank, (error, _) = next(iter(failures.items()))
        return f"rank {rank}: {_cause(error)}"
    if isinstance(error, OLMoCheckpointError):  # a traceback as text
        return str(error).strip().splitlines()[-1]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _not_raised_later(record: logging.LogRecord) -> bool:
    """Whether a thread's error is told nowhere else: one of saving is raised by the next wait for it, as a SaveError."""
    return not (record.exc_info and isinstance(record.exc_info[1], CheckpointException))


def _is_temporary(checkpoint: PathOrStr) -> bool:
    """Whether a checkpoint was saved as one that a later one replaces."""
    try:
        content = read_json(Path(checkpoint) / Checkpointer.METADATA_FNAME, {"ephemeral": (bool, None)})
    except (OSError, ValueError):
        return False
    return bool(content["ephemeral"])


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
