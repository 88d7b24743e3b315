"""One rank of ``benchmarks/memory.py``: trains a few steps and reports the most memory that each half of a step took."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train import prepare_training_environment, teardown_training_environment
from olmo_core.train.callbacks import Callback

from spattn_olmoe.model.remedies import apply_remedies
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import build_trainer, check


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since :func:`reset`) of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def reset() -> None:
    """Forget the most memory that this process had."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Watch(Callback):
    """Takes the most memory of the forward and backward passes, and of the optimiser's step, of every step."""

    before: int = 0
    peaks: list[dict[str, int]] = field(default_factory=list)

    def pre_load_batch(self) -> None:
        reset()

    def pre_optim_step(self) -> None:
        self.peaks.append({"forward and backward": resident("VmHWM") - self.before})
        reset()

    def post_train_batch(self) -> None:
        self.peaks[-1]["optimiser"] = resident("VmHWM") - self.before


def main() -> None:
    base, overrides, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    apply_remedies()
    prepare_training_environment(seed=0, backend="gloo")
    x = torch.randn(1, 1, 8, 8)
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
    config = load_experiment(base, overrides)
    check(config)
    check_layout(config, get_world_size())
    before = resident("VmRSS")
    trainer = build_trainer(config)
    watch = Watch(before=before)
    trainer.add_callback("watch", watch)
    trainer.fit()
    if get_rank() == 0:
        out.write_text(json.dumps(watch.peaks))
    teardown_training_environment()


if __name__ == "__main__":
    main()
