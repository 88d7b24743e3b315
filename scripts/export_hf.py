"""Write a checkpoint as a folder that transformers reads without this package.

python scripts/export_hf.py --checkpoint runs/quickstart-spattention --to exported/quickstart --verify
"""

from __future__ import annotations

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument("--to", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--dtype", default="float32", help="float32 (the default: lossless) or bfloat16")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every tensor and the logits afterwards, with two models in memory",
    )
    trust.add_argument(parser)
    args = parser.parse_args()
    with user_errors():
        with modules_kept():
            quiet()
            from spattn_olmoe.model.checkpoint import Checkpoint
            from spattn_olmoe.model.hf.export import export, verify
            from spattn_olmoe.paper.masks import draw, save

        checkpoint = Checkpoint.open(args.checkpoint)
        config = export(checkpoint, args.to, dtype=args.dtype, draw=lambda pattern, path: save(draw(pattern), path))
        print(f"{checkpoint.path} -> {args.to} ({config['architectures'][0]}, {args.dtype})")
        if args.verify:
            found = verify(checkpoint, args.to)
            print(
                f"verified: {found['tensors']} tensors bit for bit, logits of {found['tokens']} tokens within "
                f"{found['largest_difference']:.1e}"
            )


if __name__ == "__main__":
    main()
