"""Train an OLMoE with an attention type, or resume its training.

torchrun scripts/train.py --config configs/1b7b_spattn.yaml [key=value ...]
torchrun scripts/train.py --config configs/1b7b_spattn.yaml --dry-run
"""

from __future__ import annotations

import os
import sys

from rich.console import Console

from spattn_olmoe.errors import Parser, user_errors
from spattn_olmoe.exit_code import kept_exit_code


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its cost; start nothing")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="of a dry run: check the layout and estimate memory for so many"
    )
    parser.add_argument("--show", metavar="key", help="print one value of the resolved config; start nothing")
    parser.add_argument(
        "--verify-data", action="store_true", help="compare the data's hashes with the manifest's first"
    )
    parser.add_argument("--verbose", action="store_true", help="show all messages, not only write them to train.log")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example attention.type=eball")
    args = parser.parse_intermixed_args()
    with user_errors():
        from spattn_olmoe.cluster.report import memory_table
        from spattn_olmoe.train.config import load_experiment, show
        from spattn_olmoe.train.dry_run import dry_run
        from spattn_olmoe.train.faults import fit
        from spattn_olmoe.train.layout import check_layout
        from spattn_olmoe.train.run import check, checkpoint_to_load, prepare, with_order_of

        if args.show:
            print(show(args.config, args.overrides, args.show))
            return
        config = load_experiment(args.config, args.overrides)
        if args.dry_run:
            check(config)
            if args.gpus is not None:
                check_layout(config, args.gpus)
            console = Console()
            dry_run(with_order_of(config, checkpoint_to_load(config, verify=False)), console)
            console.print(memory_table(config, args.gpus or int(os.environ.get("WORLD_SIZE", "1"))))
            return
        trainer = prepare(config, verify_data=args.verify_data, verbose=args.verbose)
    sys.exit(fit(trainer))  # what fails from here on is no slip of the user's: it keeps its traceback


if __name__ == "__main__":
    with kept_exit_code():
        main()
