"""Runs side by side on one HTML page that needs no network.

python scripts/compare.py runs/quickstart-spattention runs/quickstart-standard --out report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spattn_olmoe import trust
from spattn_olmoe.errors import Parser, user_errors


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; several seeds of a type become a band")
    parser.add_argument("--out", type=Path, required=True, help="the page, a .html file")
    parser.add_argument("--recall", type=Path, help="recall.json of scripts/reproduce.py recall")
    trust.add_argument(parser)
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    with user_errors():
        from spattn_olmoe.paper.page import write

        print(write(args.runs, args.out, recall=args.recall))


if __name__ == "__main__":
    main()
