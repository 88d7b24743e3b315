"""Faults as callbacks, which a test adds to a run's command: real signals, limits and errors, at a place of its choice."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from olmo_core.distributed.utils import get_local_tensor, get_rank
from olmo_core.train import Trainer, trainer
from olmo_core.train.callbacks import Callback

from spattn_olmoe.model.remedies import cancellation

PREFIX = "trainer.callbacks.fault="


def inject(name: str, **values: object) -> str:
    """The override that adds a fault to a run."""
    fields = ", ".join(f"{key}: {value}" for key, value in values.items())
    return f"{PREFIX}{{_CLASS_: tests.faults.injected.{name}, {fields}}}"


@dataclass
class Fault(Callback):
    """Something that happens at a step of one rank."""

    at: int = 0
    rank: int = 0

    @property
    def due(self) -> bool:
        return self.step == self.at and get_rank() == self.rank


@dataclass
class Signal(Fault):
    """A signal to this process, or to its whole process group, between backward and the optimiser's step."""

    number: int = signal.SIGTERM
    group: bool = False

    def pre_optim_step(self) -> None:
        if self.due:
            (os.killpg if self.group else os.kill)(os.getpgid(0) if self.group else os.getpid(), self.number)


@dataclass
class SignalAtStart(Fault):
    """SIGTERM once the checkpoint is loaded, before the first step."""

    def pre_train(self) -> None:
        if self.due:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Poison(Fault):
    """NaN in a weight, behind the optimiser's back."""

    def post_train_batch(self) -> None:
        if self.due:
            weight = next(self.trainer.train_module.model.parameters())  # type: ignore[attr-defined]
            with torch.no_grad():
                get_local_tensor(weight).flatten()[0] = float("nan")


@dataclass
class KillWhileSaving(Fault):
    """SIGKILL in the middle of a file of weights."""

    def pre_optim_step(self) -> None:
        if self.due:
            self._save = torch.save
            torch.save = self._write_half

    def _write_half(self, data: Any, file: Any, *args: Any) -> None:
        if isinstance(file, Path):  # the trainer's state comes first
            return self._save(data, file, *args)
        file.write(b"\0" * 1000)
        file.flush()
        return os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class FullDisk(Fault):
    """No file of this process can grow beyond a size, which those of the weights do: as on a disk that is nearly full."""

    size: int = 160_000

    def pre_optim_step(self) -> None:
        if self.due:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass
class NaN(Fault):
    """The embeddings of ``steps`` steps are NaN, and so the loss."""

    steps: int = 1

    def pre_step(self, batch: dict[str, Any]) -> None:
        self._bad = self.at <= self.step < self.at + self.steps and get_rank() == self.rank

    def pre_train(self) -> None:
        self._bad = False
        embeddings = self.trainer.train_module.model.embeddings  # type: ignore[attr-defined]
        embeddings.register_forward_hook(lambda module, args, out: out * torch.nan if self._bad else out)


@dataclass
class InEvaluation(Fault):
    """SIGTERM, or an error, in the first batch of the evaluation at a step."""

    error: bool = False

    def pre_train(self) -> None:
        module = self.trainer.train_module
        evaluate: Callable[..., Any] = module.eval_batch

        def eval_batch(*args: Any, **kwargs: Any) -> Any:
            if self.due and self.error:
                raise ConnectionError("the evaluation's data is gone")
            if self.due:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        module.eval_batch = eval_batch  # type: ignore[method-assign]


@dataclass
class Error(Fault):
    """An exception of this rank alone."""

    def pre_optim_step(self) -> None:
        if self.due:
            raise ArithmeticError("rank lost its mind")


@dataclass
class SlowToHear(Fault):
    """SIGTERM at a step, on every rank; one of them takes longer than a step to hear what all of them answered.

    :param stock: with OLMo-core's own way of asking.
    """

    priority: ClassVar[int] = 100  # speaks before the last checkpoint is saved
    stock: bool = False

    def pre_train(self) -> None:
        if self.stock:
            Trainer.check_if_canceled = cancellation.stock_check_if_canceled  # type: ignore[method-assign]
        tell = trainer.broadcast_object

        def late(*args: Any, **kwargs: Any) -> Any:
            answer = tell(*args, **kwargs)
            time.sleep(0.5 if get_rank() == self.rank else 0.0)
            return answer

        trainer.broadcast_object = late

    def pre_step(self, batch: dict[str, Any]) -> None:
        print(f"rank {get_rank()} begins step {self.step}", flush=True)

    def pre_optim_step(self) -> None:
        if self.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def post_train(self) -> None:
        print(f"rank {get_rank()} stops after step {self.step}", flush=True)


@dataclass
class LockTakenOver(Fault):
    """Another process writes its name into the run's lock, as it does where the run has been silent for too long."""

    def pre_optim_step(self) -> None:
        if self.due:
            (Path(self.trainer.save_folder) / "lock").write_text(json.dumps({"host": "another"}))
            time.sleep(60)


@dataclass
class Pause(Callback):
    """At given steps rank 0 waits until a file is there, and the other ranks wait for it.

    :param steps: at which, before they begin.
    :param folder: of the files, whose names are the steps.
    """

    steps: list[int] = field(default_factory=list)
    folder: str = ""

    def pre_step(self, batch: dict[str, Any]) -> None:
        if self.step in self.steps and get_rank() == 0:
            (Path(self.folder) / f"at-{self.step}").touch()
            while not (Path(self.folder) / str(self.step)).exists():
                time.sleep(0.02)


@dataclass
class Slow(Callback):
    """One rank takes longer for the forward pass of every layer."""

    rank: int = 0
    seconds: float = 0.1

    def pre_train(self) -> None:
        if get_rank() == self.rank:
            for block in self.trainer.train_module.model.blocks.values():  # type: ignore[attr-defined]
                block.attention.register_forward_pre_hook(lambda module, args: time.sleep(self.seconds))
