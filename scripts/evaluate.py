"""Evaluate checkpoints: the paper's tables, any task of lm-eval, paired comparisons, held-out loss.

python scripts/evaluate.py --checkpoint runs/quickstart-spattention --suite table1 --limit 100
python scripts/evaluate.py --checkpoint DIR --tasks piqa,sciq follows_input=true
python scripts/evaluate.py --compare results/a/table1.json results/b/table1.json
python scripts/evaluate.py --checkpoint DIR_A DIR_B --loss [--by repeat]
python scripts/evaluate.py --checkpoint DIR_A DIR_B --needle --limit 32
"""

from __future__ import annotations

import argparse

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors, whole


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        default=[],
        help="a checkpoint, or a run's folder for its newest one",
    )
    parser.add_argument("--suite", help="table1 (the default), table2, table3 or core")
    parser.add_argument("--tasks", help="names of lm-eval's tasks and groups, with commas between, instead of a suite")
    parser.add_argument("--num-fewshot", type=whole(0, 1000), help="worked examples, with --tasks")
    parser.add_argument(
        "--limit", type=whole(1, 2**31), help="the first so many questions of each task, or held-out sequences"
    )
    parser.add_argument("--batch-size", type=whole(1, 2**16), default=16)
    parser.add_argument("--out", help="folder of the results; by default the checkpoint's, in evaluation/")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="paired differences of two results")
    parser.add_argument("--loss", action="store_true", help="held-out loss of one or more checkpoints")
    parser.add_argument(
        "--needle", action="store_true", help="what a number gains by having been written down, by distance"
    )
    parser.add_argument(
        "--by",
        choices=("context", "repeat"),
        help="with --loss: group tokens by how many stand before them (the default), or by how far back they repeat",
    )
    parser.add_argument(
        "--data", help="with --loss and --needle: prepared data to read instead of the checkpoint's own"
    )
    parser.add_argument(
        "options", nargs="*", metavar="key=value", help="offline, follows_input, max_length, tokenizer, device"
    )
    trust.add_argument(parser)
    return parser.parse_intermixed_args(words)


def main() -> None:
    args = parse()
    with user_errors():
        with modules_kept():
            quiet()
            from spattn_olmoe.evaluation.evaluate import main as run

        run(args)


if __name__ == "__main__":
    main()
