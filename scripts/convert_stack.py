"""Write a checkpoint of one of OLMo-core's stacks as one of the other: v1, or ddp (OLMoDDP).

python scripts/convert_stack.py --checkpoint runs/quickstart_ddp-spattention --to runs/as_v1/step150 --stack v1 --verify
"""

from __future__ import annotations

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument(
        "--to", required=True, help="the folder to write, which must not exist; stepN to resume from it"
    )
    parser.add_argument("--stack", required=True, choices=["v1", "ddp"], help="the stack to write it for")
    parser.add_argument("--verify", action="store_true", help="compare every tensor afterwards, bit for bit")
    trust.add_argument(parser)
    args = parser.parse_args()
    with user_errors():
        with modules_kept():
            quiet()
            from spattn_olmoe.model.checkpoint import Checkpoint
            from spattn_olmoe.model.convert import convert, verify
            from spattn_olmoe.model.stack import Stack

        checkpoint = Checkpoint.open(args.checkpoint)
        found = convert(checkpoint, args.to, Stack(args.stack))
        print(
            f"{checkpoint.path} ({checkpoint.stack}) -> {args.to} ({args.stack}): {found['weights']} weights, "
            f"{found['moments']} moments"
        )
        if args.verify:
            print(f"verified: {verify(checkpoint, args.to)} tensors bit for bit")


if __name__ == "__main__":
    main()
