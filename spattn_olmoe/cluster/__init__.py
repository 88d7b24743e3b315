"""What a run needs on a cluster (memory, layouts; arithmetic only) and whether its machines can run it."""

from ..train.layout import Layout
from .memory import Memory, memory
from .node import FAIL, OK, WARN, Row, check_node
from .nodes import Findings, check_cluster, merge
from .search import Plan, plan

__all__ = [
    "FAIL",
    "OK",
    "WARN",
    "Findings",
    "Layout",
    "Memory",
    "Plan",
    "Row",
    "check_cluster",
    "check_node",
    "memory",
    "merge",
    "plan",
]
