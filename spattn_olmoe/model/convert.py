"""A checkpoint of one of OLMo-core's stacks as one of the other: weights, moments and the state of the run.

Every number stays what it is. Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from olmo_core.optim import AdamWConfig, OptimConfig
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..files import complete_or_absent
from .checkpoint import Checkpoint
from .checkpoint_files import FOLDER, write_checksums
from .hf.weights import same_bits
from .lazy_save import described, save_lazily
from .remedies import apply_remedies
from .stack import DDPOptions, Stack, ddp_model
from .stack_weights import KIND, StackWeights, counterpart, open_tensors, read_tensor
from .unpickling import reading

WEIGHT, MOMENTS, STEP = "weight", ("exp_avg", "exp_avg_sq"), "step"
_KEYS = {
    Stack.v1: {WEIGHT: "{}".join(KIND[Stack.v1]), **{kind: f"optim.state.{{}}.{kind}" for kind in (*MOMENTS, STEP)}},
    Stack.ddp: {WEIGHT: "{}".join(KIND[Stack.ddp]), **{kind: f"module.{{}}.{kind}" for kind in (*MOMENTS, STEP)}},
}
"""Where a checkpoint keeps what belongs to a weight."""


def convert(checkpoint: Checkpoint, to: str | Path, stack: Stack) -> dict[str, int]:
    """Write a checkpoint of the other stack. The folder is complete or not there.

    A run resumes from it where one of the same stack would have: optimiser, step, data order and all. Weights that came
    without an optimiser's state stay without. Those of the stack ``ddp`` are stored in float32, its masters' type.

    :param to: a folder that does not exist yet; to resume a run, ``stepN`` in its save folder.
    :returns: how many ``weights`` and ``moments`` were written.
    :raises ValueError: it is of that stack already, ``to`` exists, or the model has no counterpart.
    """
    if checkpoint.stack == stack:
        raise ValueError(f"--stack {stack}: checkpoint {checkpoint.path} is of that stack already")
    ddp_model(checkpoint.model, DDPOptions())  # has a counterpart
    apply_remedies()
    source = _Source(checkpoint)
    state = dict(_state(source, stack, checkpoint))
    with complete_or_absent(to, _bytes(state)) as folder:
        _copy_files(Path(checkpoint.path), folder, checkpoint.config | {"stack": str(stack)})
        inner = folder / "model_and_optim" if source.inner else folder
        inner.mkdir(exist_ok=True)
        save_lazily(inner, {key: value for key, (value, _) in state.items()}, lambda key: state[key][1]())
        write_checksums(folder, rank=0, ranks=1)
    return {"weights": len(source.names(stack)), "moments": len(MOMENTS) * len(source.names(stack)) * source.trained}


def verify(checkpoint: Checkpoint, converted: str | Path) -> int:
    """Compare a converted checkpoint with its source: every weight and moment, bit for bit, by v1's names.

    :returns: how many tensors were compared.
    :raises ValueError: one differs.
    """
    there = Checkpoint.open(converted)
    one, other = _Source(checkpoint), _Source(there)
    kinds = (WEIGHT, *MOMENTS, STEP) if one.trained else (WEIGHT,)
    for name in one.weights.v1:
        for kind in kinds:
            a, b = (source.read(Stack.v1, name, kind) for source in (one, other))
            if not same_bits(a.to(b.dtype) if kind == WEIGHT else a, b):
                raise ValueError(f"--verify: {kind} {name} of {converted} is not the source's: convert it again")
    return len(one.weights.v1) * len(kinds)


class _Source:
    """What a checkpoint holds, read by the names of either stack."""

    def __init__(self, checkpoint: Checkpoint):
        self.stack, self.path = checkpoint.stack, checkpoint.path
        self.folder, self.metadata = open_tensors(checkpoint.path)
        self.inner = self.folder != checkpoint.path
        self.weights = StackWeights.of(checkpoint.model)
        checkpoint.weights()  # are those of this model
        stored = self.metadata.state_dict_metadata
        self.trained = all(_KEYS[self.stack][STEP].format(name) in stored for name in self.names(self.stack))

    def names(self, stack: Stack) -> dict[str, tuple[int, ...]]:
        """Name and shape of the weights in a stack."""
        return self.weights.v1 if stack == Stack.v1 else self.weights.ddp

    def dtype(self, name: str) -> torch.dtype:
        """Of a weight, by its name in the checkpoint."""
        entry = self.metadata.state_dict_metadata[_KEYS[self.stack][WEIGHT].format(name)]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def read(self, stack: Stack, name: str, kind: str) -> Tensor:
        """A weight, a moment or the number of steps, by its name in a stack and in its shape there."""

        def stored(own: str) -> Tensor:
            with reading(self.path):
                return read_tensor(self.folder, self.metadata, _KEYS[self.stack][kind].format(own))

        if kind == STEP:  # alike for what is one weight in one stack and two in the other
            return stored(name if stack == self.stack else counterpart(name))
        if stack == self.stack:
            return stored(name).view(self.names(stack)[name])
        return self.weights.to_v1(name, stored) if stack == Stack.v1 else self.weights.to_ddp(name, stored)


Made = tuple[Any, Callable[[], Tensor]]


def _state(source: _Source, stack: Stack, checkpoint: Checkpoint) -> Iterator[tuple[str, Made]]:
    """By key of the new checkpoint: what describes its value, and what makes it."""
    kinds = (WEIGHT, *MOMENTS, STEP) if source.trained else (WEIGHT,)
    stored = source.dtype(next(iter(source.names(source.stack))))
    for name, shape in source.names(stack).items():
        for kind in kinds:
            dtype = stored if kind == WEIGHT and stack == Stack.v1 else torch.float32
            # The optimiser of the stack ddp keeps its state flat.
            size = () if kind == STEP else shape if stack == Stack.v1 else (torch.Size(shape).numel(),)

            def make(name: str = name, kind: str = kind, size: Any = size, dtype: torch.dtype = dtype) -> Tensor:
                return source.read(stack, name, kind).reshape(size).to(dtype)

            yield _KEYS[stack][kind].format(name), (described(size, dtype), make)
    if source.trained and stack == Stack.v1:
        for name in source.weights.v1:
            for key, value in _param_group(checkpoint).items():
                yield f"optim.param_groups.{name}.{key}", (value, torch.Tensor)


def _param_group(checkpoint: Checkpoint) -> dict[str, Any]:
    """The options that v1's optimiser stores with every weight, from the run's config."""
    config: Any = OptimConfig.from_dict(checkpoint.config["train_module"]["optim"])
    assert isinstance(config, AdamWConfig)
    options = {key: getattr(config, key) for key in ("lr", "betas", "eps", "weight_decay", "foreach", "fused")}
    group = torch.optim.AdamW([torch.empty(())], **options).param_groups[0]
    return {key: value for key, value in group.items() if key != "params"} | {"initial_lr": config.lr}


def _bytes(state: dict[str, Made]) -> int:
    return sum(value.numel() * value.element_size() for value, _ in state.values() if isinstance(value, Tensor))


def _copy_files(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Everything but the tensors: the trainer's state, the data's and the attention's records, the tokenizer."""
    for path in sorted(source.iterdir()):
        if path.name in ("model_and_optim", FOLDER, "config.json", ".metadata") or path.suffix == ".distcp":
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
