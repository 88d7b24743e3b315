"""Arguments that benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spattn_olmoe import machine
from spattn_olmoe.errors import whole
from spattn_olmoe.patterns import find_variant


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Of a benchmark that measures settings on one device, stores them and makes a table and a plot of them."""
    parser.add_argument(
        "--missing", action="store_true", help="leave out what is stored without an error, of this commit and device"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--note", help="stored with the results, e.g. that the machine was shared")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results; default: benchmarks/results/<device>")
    parser.add_argument("--report", action="store_true", help="measure nothing: make the table and the plot again")


def add_patterns(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The named masks that a benchmark measures, by their names in its results."""
    parser.add_argument(
        "--patterns",
        nargs="+",
        type=named_mask,
        default=list(default),
        metavar="NAME",
        help=f"default: {' '.join(default)}",
    )


def named_mask(name: str) -> str:
    """The name of a mask, for argparse, which reports one that is unknown."""
    try:
        return find_variant(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_kills(parser: argparse.ArgumentParser, kills: int, results: str) -> None:
    """Of a benchmark that kills what a config starts: how often by default, and the name of its result file."""
    parser.add_argument("config")
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--kills", type=whole(1, 10**6), default=kills)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / results)
