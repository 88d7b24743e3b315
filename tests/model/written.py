"""How much operations write: what a step costs in memory's bandwidth, counted and not timed."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):
    """Counts the numbers that operations write, in tensors of ``least`` numbers or more."""

    def __init__(self, least=0):
        super().__init__()
        self.least = least
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, torch.Tensor) and out.numel() >= self.least:
            self.numbers += out.numel()
        return out
