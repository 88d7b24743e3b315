"""Experiments in YAML, and runs that resume."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ExperimentConfig, load_experiment

__all__ = ["ExperimentConfig", "load_experiment"]


def __getattr__(name: str) -> Any:
    # on first use: whoever only reads what a run has written does not wait for OLMo-core
    if name in __all__:
        from . import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
