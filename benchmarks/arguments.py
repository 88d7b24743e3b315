"""Arguments that benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import machine


def add_kills(parser: argparse.ArgumentParser, kills: int, results: str) -> None:
    """Of a benchmark that kills what a config starts: how often by default, and the name of its result file."""
    parser.add_argument("config")
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / results)
