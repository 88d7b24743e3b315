"""The weights of a model in both of OLMo-core's stacks: names, shapes, and each way from one to the other, exactly.

With ``E`` experts of ``h`` hidden units, v1 keeps ``w1`` (gate), ``w2`` (down) and ``w3`` (up), each ``(E h, d)``. The stack
``ddp`` keeps ``w_up_gate (E, 2 h, d)``, up before gate, and ``w_down (E, h, d)``. All else differs by name alone. Moments of
Adam have the shapes of their weights and go the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from olmo_core.distributed.checkpoint import get_checkpoint_metadata
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader
from olmo_core.nn.transformer import Transformer, TransformerConfig
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .stack import Stack
from .unpickling import reading

GATE, DOWN, UP = (f"feed_forward_moe.experts.mlp.{w}" for w in ("w1", "w2", "w3"))
UP_GATE, DDP_DOWN = "routed_experts.w_up_gate", "routed_experts.w_down"
NAMES = {
    "feed_forward_moe.router.weight": "routed_experts_router.weight",
    GATE: UP_GATE,
    UP: UP_GATE,
    DOWN: DDP_DOWN,
}
"""Parts of a block that have another name in the stack ``ddp``, by v1's."""

KIND = {Stack.v1: ("model.", ""), Stack.ddp: ("module.", ".main")}
"""What precedes and follows a weight's name in the checkpoints of a stack."""

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class StackWeights:
    """The weights of one model in both stacks.

    :param v1: name and shape in v1, in its order.
    """

    v1: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: TransformerConfig) -> StackWeights:
        """Of a model config of v1. Nothing is allocated."""
        return cls({name: tuple(w.shape) for name, w in model.build(init_device="meta").named_parameters()})

    @property
    def ddp(self) -> dict[str, tuple[int, ...]]:
        """Name and shape in the stack ``ddp``."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.v1.items():
            layer, part = split(name)
            E, h, d = self._experts(layer) if part in (GATE, UP, DOWN) else (0, 0, 0)
            found[counterpart(name)] = {GATE: (E, 2 * h, d), UP: (E, 2 * h, d), DOWN: (E, h, d)}.get(part, shape)
        return found

    def to_v1(self, name: str, read: Read) -> Tensor:
        """One tensor of v1, from what ``read`` reads by its name in the stack ``ddp``, flat or not."""
        layer, part = split(name)
        tensor = read(counterpart(name))
        if part in (UP, GATE):
            E, h, d = self._experts(layer)
            tensor = tensor.view(E, 2, h, d)[:, 1 if part == GATE else 0]
        return tensor.reshape(self.v1[name])

    def to_ddp(self, name: str, read: Read) -> Tensor:
        """One tensor of the stack ``ddp``, from what ``read`` reads by its name in v1."""
        layer, part = split(name)
        if part == UP_GATE:
            experts = self._experts(layer)
            return torch.cat([read(layer + UP).view(experts), read(layer + GATE).view(experts)], dim=1)
        if part == DDP_DOWN:
            return read(layer + DOWN).view(self._experts(layer))
        return read(counterpart(name))

    def _experts(self, layer: str) -> tuple[int, int, int]:
        """Experts, hidden units of each and model dimension of a layer."""
        rows, d = self.v1[layer + GATE]
        E = self.v1[layer + "feed_forward_moe.router.weight"][0] // d
        return E, rows // E, d


def split(name: str) -> tuple[str, str]:
    """``blocks.N.``, or nothing, and the rest of a weight's name."""
    if not name.startswith("blocks."):
        return "", name
    word, i, part = name.split(".", 2)
    return f"{word}.{i}.", part


def counterpart(name: str) -> str:
    """The name in the other stack of the weight that holds a weight's numbers, the first of two where there are two."""
    layer, part = split(name)
    return layer + (NAMES | {new: old for old, new in reversed(NAMES.items())}).get(part, part)


# ---- in a checkpoint -------------------------------------------------------------------------------------------------


class StoredWeights:
    """The weights in a checkpoint by v1's names, whichever stack trained them; they are read one tensor at a time.

    :param sizes: by v1's name.
    :raises ValueError: the checkpoint of the stack ``ddp`` is of another model.
    """

    def __init__(self, path: str, stack: Stack, model: TransformerConfig):
        self.path = path
        self.folder, self._metadata = open_tensors(path)
        self._stack, self._before_after = stack, KIND[stack]
        found = {
            name: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and (name := self._name(key)) is not None
        }
        if stack == Stack.v1:
            self.sizes = found
            return
        self._weights = StackWeights.of(model)
        wanted = self._weights.ddp
        numbers = {name: torch.Size(shape).numel() for name, shape in wanted.items()}
        shaped = {n: wanted[n] if torch.Size(size).numel() == numbers.get(n) else size for n, size in found.items()}
        require_weights(shaped, wanted, f"checkpoint {path}")  # they are stored flat
        self.sizes = self._weights.v1

    def read(self, name: str) -> Tensor:
        """One weight by v1's name, in its shape there."""
        with reading(self.path):
            return self._stored(name) if self._stack == Stack.v1 else self._weights.to_v1(name, self._stored)

    @torch.no_grad()
    def copy_to(self, model: Transformer) -> None:
        """Fill a model of v1 with them."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read(name))

    def _name(self, key: str) -> str | None:
        before, after = self._before_after
        return key[len(before) : len(key) - len(after)] if key.startswith(before) and key.endswith(after) else None

    def _stored(self, name: str) -> Tensor:
        before, after = self._before_after
        return read_tensor(self.folder, self._metadata, f"{before}{name}{after}")


def require_weights(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise at the first weight that is missing, surplus or of another shape."""
    for name, size in wanted.items():
        if name not in found:
            raise ValueError(f"{where} lacks the weight {name} {size}: it is of another model, or incomplete")
        if found[name] != size:
            raise ValueError(f"{where}: {name} has shape {found[name]} but the config asks for {size}")
    if surplus := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{where} has a weight that the model does not: {surplus[0]} ({len(surplus)} in all)")


def open_tensors(path: str) -> tuple[str, Metadata]:
    """Where a checkpoint keeps its tensors, and their index; weights alone lie in its own folder."""
    folder = f"{path.rstrip('/')}/model_and_optim"
    with reading(path):
        try:
            return folder, get_checkpoint_metadata(folder)
        except FileNotFoundError:
            return path, get_checkpoint_metadata(path)


def read_tensor(folder: str, metadata: Metadata, key: str) -> Tensor:
    """One tensor of a checkpoint by its key, whole, whatever ranks it was saved on and is read on."""
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    state_dict_loader.load({key: tensor}, storage_reader=RemoteFileSystemReader(folder), no_dist=True)
    return tensor
