"""Experiments in YAML, and runs that resume."""

from typing import TYPE_CHECKING

from ..lazy import on_first_use

if TYPE_CHECKING:
    from .config import ExperimentConfig, load_experiment

__all__ = ["ExperimentConfig", "load_experiment"]

__getattr__ = on_first_use(__name__, {"ExperimentConfig": "config", "load_experiment": "config"})
