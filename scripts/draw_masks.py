"""Draw what every head of a run, or of an attention type, attends, as a PNG.

python scripts/draw_masks.py --config configs/quickstart.yaml attention.type=bigbird --out masks.png
python scripts/draw_masks.py --checkpoint runs/quickstart-spattention --out masks.png
python scripts/draw_masks.py --type sharing --heads 8 --band-length 1024 --out masks.png
python scripts/draw_masks.py --type eball --heads 8 --band-length 1024 --length 400 --out short_input.png
python scripts/draw_masks.py --figure 1 --out figure1.png     # the paper's Figure 1; 2: its Figure 2
python scripts/draw_masks.py --overview --out masks_overview.png
"""

import argparse
import sys

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, user_errors, whole


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a run's YAML file, with key=value as for train.py")
    what.add_argument("--checkpoint", help="a checkpoint, or a run's folder for its newest one")
    what.add_argument(
        "--type", help="a named mask, or an attention type as in attention.type, with options as key=value"
    )
    what.add_argument("--figure", type=int, choices=(1, 2), help="a figure of the paper")
    what.add_argument("--overview", action="store_true", help="all named masks, a few heads each")
    parser.add_argument("--heads", type=whole(1, 512), help="with --type: query heads H (default 8)")
    parser.add_argument("--band-length", type=whole(1, 2**20), help="with --type: band length N (default 1024)")
    parser.add_argument(
        "--length", type=whole(1, 2**20), help="input length T (default: the band length, or a run's of training)"
    )
    parser.add_argument("--out", required=True, help="the picture to write, .png")
    parser.add_argument("words", nargs="*", metavar="key=value", help="with --type or --config")
    trust.add_argument(parser)
    args = parser.parse_args(argv)
    shape = [
        key for key, value in {"--heads": args.heads, "--band-length": args.band_length}.items() if value is not None
    ]
    length = ["--length"] if args.length is not None else []
    refused = {"figure": shape + length + args.words, "overview": shape + length + args.words}
    refused |= {"config": shape, "checkpoint": shape + args.words}
    for name, given in refused.items():
        if getattr(args, name) not in (None, False) and given:
            parser.error(f"{given[0]} goes with --type: --{name} has its own shape")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with user_errors():
        with modules_kept():
            from spattn_olmoe.paper.draw_masks import main as draw

        print(draw(args))


if __name__ == "__main__":
    main(sys.argv[1:])
