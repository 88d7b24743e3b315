"""Train an OLMoE with an attention type, or resume its training.

torchrun scripts/train.py --config configs/1b7b_spattn.yaml [key=value ...]
torchrun scripts/train.py --config configs/1b7b_spattn.yaml --dry-run     # what it would be; no GPU needed
torchrun scripts/train.py --config configs/1b7b_spattn.yaml --show        # every value, with the defaults
"""

from __future__ import annotations

import os
import sys

from rich.console import Console

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors, whole
from spattn_olmoe.exit_code import kept_exit_code


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print what the run computes and costs; start nothing")
    parser.add_argument(
        "--gpus",
        type=whole(1, 2**17),
        metavar="N",
        help="with --dry-run: check the layout and estimate the memory of N GPUs",
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const="",
        metavar="key",
        help="print the resolved config, or one value of it; start nothing",
    )
    parser.add_argument(
        "--verify-data", action="store_true", help="compare the data's hashes with the manifest's first"
    )
    parser.add_argument("--verbose", action="store_true", help="show all messages, not only write them to train.log")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example attention.type=eball")
    trust.add_argument(parser)
    args = parser.parse_intermixed_args()
    with user_errors():
        with modules_kept():
            import torch

            from spattn_olmoe.cluster.report import memory_table
            from spattn_olmoe.train.config import load_experiment, show
            from spattn_olmoe.train.dry_run import dry_run, resolved
            from spattn_olmoe.train.faults import fit
            from spattn_olmoe.train.layout import check_layout
            from spattn_olmoe.train.run import check, checkpoint_to_load, prepare, with_order_of

        if args.dry_run or args.show is not None:
            quiet()
        if args.show and "=" not in args.show:
            print(show(args.config, args.overrides, args.show))
            return
        overrides = args.overrides + [args.show] * bool(args.show)  # --show key=value: the key was left out
        config = load_experiment(args.config, overrides)
        if args.show is not None:
            print(resolved(config), end="")
            return
        if args.dry_run:
            check(config)
            if args.gpus is not None:
                check_layout(config, args.gpus)
            console = Console()
            dry_run(with_order_of(config, checkpoint_to_load(config, verify=False)), console)
            ranks = args.gpus or (int(os.environ.get("WORLD_SIZE", "1")) if torch.cuda.is_available() else None)
            if ranks is not None:
                console.print(memory_table(config, ranks))
            more = "" if ranks is not None else "; --gpus N estimates how much memory each of N GPUs needs"
            console.print(f"--show prints every value of the config{more}", highlight=False, soft_wrap=True)
            return
        trainer = prepare(config, verify_data=args.verify_data, verbose=args.verbose)
    sys.exit(fit(trainer))  # errors from here on are bugs, so they keep their traceback


if __name__ == "__main__":
    with kept_exit_code():
        main()
