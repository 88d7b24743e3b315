"""Experiments in YAML, and runs that resume."""

from .config import ExperimentConfig, load_experiment

__all__ = ["ExperimentConfig", "load_experiment"]
