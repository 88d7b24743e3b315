"""The paper's tables, figures and appendix experiment, each as one command.

python scripts/reproduce.py table3 --scale cpu --seeds 3
python scripts/reproduce.py table1 --scale paper --dry-run
python scripts/reproduce.py figure1
python scripts/reproduce.py appendix_a
python scripts/reproduce.py conversion --seeds 3
python scripts/reproduce.py loss_by_tokens --seeds 3
python scripts/reproduce.py throughput
python scripts/reproduce.py recall --variants dense,sharing,exclusive steps=500

After any interruption, run the same command again: it resumes, and repeats nothing that is finished.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors, whole

STUDIES = ("recall", "recall_two_hop", "copying", "selective_copying")
TARGETS = (
    *("table1", "table2", "table3", "figure1", "figure2", "appendix_a", "conversion", "loss_by_tokens", "throughput"),
    *STUDIES,
)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--scale", choices=("paper", "gpu", "cpu"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--seeds", type=whole(1, 1000), help="runs of each attention type; by default the scale's (3; paper: 1)"
    )
    parser.add_argument(
        "--jobs", type=whole(1, 1024), help="runs at the same time; by default one per core on a CPU, else 1"
    )
    parser.add_argument("--out", type=Path, help="folder of results and report; default: runs/reproduce/SCALE")
    parser.add_argument("--config", type=Path, help="a YAML file: your own model and data instead of the scale's")
    parser.add_argument("--variants", help="with commas between: these instead of the table's")
    parser.add_argument("--dry-run", action="store_true", help="print commands, tokens, FLOPs and hours; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, as for scripts/train.py")
    trust.add_argument(parser)
    return parser.parse_intermixed_args(words)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    with user_errors():
        with modules_kept():
            quiet()
            if args.target == "throughput":
                from benchmarks.throughput import main as reproduce
            else:
                from spattn_olmoe.paper.reproduce import main as reproduce

        reproduce(args)


if __name__ == "__main__":
    main()
