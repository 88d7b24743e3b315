"""Degrees of parallelism within a layer."""

from __future__ import annotations

from typing import NamedTuple

from olmo_core.train.train_module import TransformerTrainModuleConfig


class Degrees(NamedTuple):
    """Over how many ranks a config's ``train_module`` spreads a layer, by kind of parallelism; 1 is none."""

    tensor: int
    context: int
    expert: int

    @classmethod
    def of(cls, module: TransformerTrainModuleConfig) -> Degrees:
        """The degrees of a config's ``train_module``."""
        parts = (module.tp_config, module.cp_config, module.ep_config)
        return cls(*(part.degree if part is not None else 1 for part in parts))

    @property
    def heads(self) -> int:
        """Ranks that share the heads of a layer: Ulysses exchanges sequence for heads, so it multiplies."""
        return self.tensor * self.context
