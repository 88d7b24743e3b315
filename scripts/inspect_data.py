"""Look at a folder of token shards: python scripts/inspect_data.py DIR [--hashes] [--documents 0 17] [--split train]"""

from __future__ import annotations

import json

from rich.console import Console

from spattn_olmoe.data import verify
from spattn_olmoe.data.inspection import decode, document, histogram
from spattn_olmoe.data.manifest import check_summary
from spattn_olmoe.data.summary import summary_table, warnings
from spattn_olmoe.errors import Parser, user_errors, whole
from spattn_olmoe.text import visible


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--hashes", action="store_true", help="read every byte, compare SHA-256 and check every id")
    parser.add_argument(
        "--documents", type=whole(0, 2**62), nargs="*", default=[0], metavar="N", help="decode these, from 0"
    )
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--characters", type=whole(0, 2**31), default=1000, help="show so much of each document")
    args = parser.parse_args()
    console = Console()
    with user_errors():
        manifest = verify(args.folder, hashes=args.hashes)
        check_summary(manifest)
        texts = [(n, ids := document(manifest, args.split, n), decode(manifest, ids)) for n in args.documents]
    console.print(summary_table(manifest))
    console.print(f"tokenizer: {json.dumps(vars(manifest.tokenizer))}", soft_wrap=True, markup=False)
    console.print(f"made with: {json.dumps(manifest.versions)}", soft_wrap=True, markup=False)
    for warning in warnings(manifest):
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    console.print("hashes: all shards as recorded" if args.hashes else "sizes: as recorded (--hashes reads every byte)")
    console.print(histogram(manifest.statistics["lengths"]))
    for number, ids, text in texts:
        rest = f" ... {len(text) - args.characters:,} more characters" if len(text) > args.characters else ""
        console.rule(f"{args.split} {number}: {len(ids):,} tokens")
        console.print(visible(text[: args.characters]) + rest, markup=False, highlight=False)


if __name__ == "__main__":
    main()
