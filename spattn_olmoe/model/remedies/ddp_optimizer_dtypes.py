"""The optimiser of the stack ``ddp`` on a CPU.

It tells bfloat16 weights by the name ``torch.cuda.BFloat16Tensor``. On a CPU the name is another, so that it takes them for
float32 and fails (``Expect fp32 param``). Here a weight on a CPU gives the name that it would have on a GPU while the
optimiser is built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from olmo_core.optim.moe_optimizer import OLMoDDPOptimizer
from torch import Tensor

from .release import require_tested_release

_stock_init = OLMoDDPOptimizer.__init__


def apply() -> None:
    """Make ``OLMoDDPOptimizer`` see the dtype of weights on a CPU."""
    require_tested_release(__name__)
    OLMoDDPOptimizer.__init__ = __init__  # type: ignore[method-assign]


def __init__(self: OLMoDDPOptimizer, param_groups: Iterable[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    """As the stock one."""
    groups = list(param_groups)
    on_a_cpu = [
        parameter
        for group in groups
        for parameter in group["named_params"].values()
        if isinstance(parameter, Tensor) and parameter.device.type == "cpu"
    ]
    for parameter in on_a_cpu:
        parameter.type = functools.partial(_name_on_a_gpu, parameter)  # type: ignore[method-assign]
    try:
        _stock_init(self, groups, *args, **kwargs)
    finally:
        for parameter in on_a_cpu:
            del parameter.type


def _name_on_a_gpu(parameter: Tensor, *args: Any) -> Any:
    name = torch.Tensor.type(parameter, *args)
    return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name
