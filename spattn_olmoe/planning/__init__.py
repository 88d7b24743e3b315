"""What a run will need on a cluster: memory of a GPU, time, and which parallel layouts fit. Arithmetic only; docs/planning.md."""

from .layouts import Layout
from .memory import Memory, memory
from .search import Plan, plan

__all__ = ["Layout", "Memory", "Plan", "memory", "plan"]
