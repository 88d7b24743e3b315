"""Can this machine, or every machine of a job, run a config? Exit code 1 means no.

python scripts/check_env.py --config configs/1b7b_spattn.yaml [key=value ...]
torchrun --nnodes=2 --nproc_per_node=8 ... scripts/check_env.py --config configs/1b7b_spattn.yaml [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, real, user_errors
from spattn_olmoe.exit_code import kept_exit_code


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument(
        "--min-bandwidth",
        type=real(0, 1e6),
        default=0.0,
        metavar="GB/S",
        help="fail below this all-reduce between GPUs",
    )
    parser.add_argument(
        "--failed-nodes", type=Path, metavar="FILE", help="write the machines that fail to it, one a line"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    trust.add_argument(parser)
    args = parser.parse_intermixed_args()
    with user_errors():
        with modules_kept():
            quiet()

            from spattn_olmoe.cluster import FAIL, OK, WARN, Findings, check_cluster
            from spattn_olmoe.train.config import load_experiment

        config = load_experiment(args.config, args.overrides)

        def report(found: Findings) -> None:
            if args.failed_nodes is not None and found.failed_nodes:
                args.failed_nodes.write_text("".join(f"{node}\n" for node in found.failed_nodes))
            table = Table("check", "", "found", "remedy", title=config.name, min_width=100)
            style = {OK: "green", WARN: "yellow", FAIL: "bold red"}
            for row in found.rows:
                table.add_row(row.name, f"[{style[row.status]}]{row.status}", row.found, row.remedy)
            Console(width=None if sys.stdout.isatty() else 160).print(table)

        rows = check_cluster(config, args.min_bandwidth, report).rows
    return int(any(row.status == FAIL for row in rows))


if __name__ == "__main__":
    with kept_exit_code():
        sys.exit(main())
