"""Entropy and diversity of a checkpoint's attention heads, with a picture of every head.

python scripts/analyze_heads.py --checkpoint runs/quickstart-spattention runs/quickstart-standard --out heads
"""

from __future__ import annotations

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors, whole


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", required=True, help="checkpoints, or runs' folders for their newest")
    parser.add_argument("--data", help="prepared data to read instead of the first checkpoint's own")
    parser.add_argument(
        "--sequences", type=whole(1, 2**31), default=32, help="held-out sequences to look at (default 32)"
    )
    parser.add_argument("--length", type=whole(1, 2**24), help="tokens of each; by default the length of training")
    parser.add_argument("--out", required=True, help="folder for heads.json, heads.md and heads.png")
    trust.add_argument(parser)
    args = parser.parse_args()
    with user_errors():
        with modules_kept():
            quiet()
            from spattn_olmoe.paper.analyze_heads import main as analyze

        print(analyze(args.checkpoint, args.out, data=args.data, sequences=args.sequences, length=args.length))


if __name__ == "__main__":
    main()
