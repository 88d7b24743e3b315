"""Saving checkpoints: what is written beside the weights, and what is printed where one cannot be saved."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from olmo_core.aliases import PathOrStr
from olmo_core.distributed.utils import get_rank
from olmo_core.exceptions import OLMoCheckpointError
from olmo_core.io import is_url
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from torch.distributed.checkpoint.api import CheckpointException


class SaveError(OLMoCheckpointError):
    """A checkpoint could not be saved: which, why, and what to do."""


@dataclass
class SafeCheckpointer(CheckpointerCallback):
    """OLMo-core's checkpointer, which says what to do where a checkpoint cannot be saved.

    The run ends then, for it would train on without a net. Earlier checkpoints are not touched.
    """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> str:
        step = f"{self.save_folder}/{self.checkpointer.checkpoint_dirname(self.step)}"
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
            f"{free}Earlier checkpoints are intact, and the same command goes on from the newest. If space (or quota) was "
            "lacking, free some first, or copy the newest into another trainer.save_folder"
        )


def _cause(error: BaseException) -> str:
    """What went wrong, in a line, through the wrappers of torch.distributed.checkpoint and OLMo-core's writer."""
    failures = getattr(error, "failures", None)
    if failures:  # by rank: the exception and its traceback
        rank, (error, _) = next(iter(failures.items()))
        return f"rank {rank}: {_cause(error)}"
    if isinstance(error, OLMoCheckpointError):  # a traceback as text
        return str(error).strip().splitlines()[-1]
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
