"""A module with some of its names exchanged, for one other module to see."""

from __future__ import annotations

from typing import Any


class Substitute:
    """Has the names given, and all others of ``module``."""

    def __init__(self, module: Any, **names: Any):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
