"""Whether this machine, and every other one of a job, can run a config: what ``scripts/check_env.py`` looks at."""

from .checks import FAIL, OK, WARN, Row, check_node
from .cluster import check_cluster, merge

__all__ = ["FAIL", "OK", "WARN", "Row", "check_cluster", "check_node", "merge"]
