"""What a run needs on a cluster, and the layout to give it, on paper.

python scripts/plan.py --config configs/1b7b_spattn.yaml --gpus 16 --gpu h100 [key=value ...]
"""

from __future__ import annotations

from rich.console import Console

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors, whole


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--gpus", required=True, type=whole(1, 2**17), metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", required=True, help="h100, h200, a100 or b200")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    trust.add_argument(parser)
    args = parser.parse_intermixed_args()
    with user_errors():
        with modules_kept():
            quiet()

            from spattn_olmoe.cluster import plan
            from spattn_olmoe.cluster.report import print_plan
            from spattn_olmoe.train.config import load_experiment
            from spattn_olmoe.train.run import check

        config = load_experiment(args.config, args.overrides)
        check(config)
        print_plan(plan(config, args.gpus, args.gpu), args.config, args.overrides, Console())


if __name__ == "__main__":
    main()
