"""Whether a run still moves, for those who watch it: signs of life, stacks of ranks that hang, and slow ranks by name."""

from __future__ import annotations

import faulthandler
import logging
import socket
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from olmo_core.distributed.utils import all_gather_object, get_rank, get_world_size
from olmo_core.train.callbacks import Callback

from .metrics import run_folder
from .parts import model_parts

log = logging.getLogger(__name__)

HEARTBEAT_FILE = "heartbeat"
STACKS_FOLDER = "stacks"
SLOWEST_METRIC = "throughput/slowest rank"
BEHIND_METRIC = "throughput/slowest rank behind the median (%)"


@dataclass
class Heartbeat(Callback):
    """Gives the file ``heartbeat`` a new time after every step, and writes stacks where a step does not end.

    Whoever launched the run watches that file from outside. A thread of C, which no lock of Python stops, writes the stacks
    of every rank to ``stacks/rankN.txt``.

    :param stacks_after: seconds without a step. The process group gives up after 900.
    """

    enabled: bool = True
    stacks_after: float = 600.0
    _stacks: TextIO | None = None

    def __post_init__(self) -> None:
        if self.stacks_after <= 0:
            raise ValueError(
                f"trainer.callbacks.heartbeat.stacks_after={self.stacks_after} (seconds) must be greater than 0"
            )

    def pre_train(self) -> None:
        if not self.enabled:
            return
        folder = run_folder(self.trainer) / STACKS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (folder / f"rank{get_rank()}.txt").open("a")  # those of a hang are read when the run is back
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} started on {socket.gethostname()}", file=self._stacks, flush=True)
        self._beat()

    def post_step(self) -> None:
        self._beat()

    def close(self) -> None:
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._stacks = None

    def _beat(self) -> None:
        if self._stacks is not None:
            faulthandler.dump_traceback_later(self.stacks_after, file=self._stacks)
            if get_rank() == 0:
                (run_folder(self.trainer) / HEARTBEAT_FILE).touch()


@dataclass
class Stragglers(Callback):
    """Names the slowest rank every ``interval`` steps.

    A step takes all ranks equally long, since they wait for each other. What is compared is what a rank does alone: the forward
    passes of its blocks in one step, and loading its batch. Under tensor, context and expert parallelism those include
    waiting for the group's other ranks, and a slow rank shows as its group.

    :param behind: the percentage behind the median from which a warning names rank and host.
    """

    enabled: bool = True
    interval: int = 100
    behind: float = 15.0
    _load_started: float = 0.0
    _loading: float = 0.0
    _began: Any = None
    _spans: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.interval < 2:
            raise ValueError(f"trainer.callbacks.stragglers.interval={self.interval} must be at least 2 steps")

    def pre_train(self) -> None:
        if not self.enabled or get_world_size() == 1:
            return
        for part in model_parts(self.trainer.train_module):
            for block in part.blocks.values():
                # after FSDP's own hooks, which wait for weights
                block.register_forward_pre_hook(torch.compiler.disable(self._begin))
                block.register_forward_hook(torch.compiler.disable(self._end))

    def pre_load_batch(self) -> None:
        self._load_started = time.perf_counter()

    def pre_step(self, batch: dict[str, Any]) -> None:
        self._loading = time.perf_counter() - self._load_started

    @property
    def _measured(self) -> bool:
        return self.step % self.interval == 0

    def _begin(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._measured and module.training:
            self._began = _now(self.trainer.device)

    def _end(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._measured and module.training:
            self._spans.append((self._began, _now(self.trainer.device)))

    def post_step(self) -> None:
        if self.enabled and get_world_size() > 1 and self._measured:
            seconds = sum(_seconds(*span) for span in self._spans) + self._loading
            self._spans.clear()
            self._compare(all_gather_object((seconds, socket.gethostname())))

    def _compare(self, ranks: list[tuple[float, str]]) -> None:
        median = statistics.median_low(seconds for seconds, _ in ranks)
        slowest = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
        seconds, host = ranks[slowest]
        behind = 100 * (seconds / median - 1) if median > 0 else 0.0
        self.trainer.record_metric(SLOWEST_METRIC, float(slowest))
        self.trainer.record_metric(BEHIND_METRIC, behind)
        if behind >= self.behind and get_rank() == 0:
            log.warning(
                "step %d: rank %d on %s is %.0f %% behind the median rank in what it does alone (%.1f ms)",
                self.step,
                slowest,
                host,
                behind,
                1000 * seconds,
            )


def _now(device: torch.device) -> Any:
    """This moment of a device: it is read later, so that nothing waits for it now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
