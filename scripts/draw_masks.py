"""Draw what every head of an attention type attends, as a PNG.

python scripts/draw_masks.py --type sharing --heads 8 --band-length 1024 --out masks.png
python scripts/draw_masks.py --type eball --heads 8 --band-length 1024 --length 400 --out short_input.png
python scripts/draw_masks.py --figure 1 --out figure1.png     # the paper's Figure 1; 2: its Figure 2
python scripts/draw_masks.py --overview --out masks_overview.png
"""

import argparse
import sys
from typing import Any

from matplotlib.figure import Figure

from spattn_olmoe.errors import Parser, user_errors
from spattn_olmoe.paper import masks
from spattn_olmoe.patterns import build_mask


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--type", help="a named mask, or an attention type as in attention.type")
    what.add_argument("--figure", type=int, choices=(1, 2), help="a figure of the paper")
    what.add_argument("--overview", action="store_true", help="all named masks, a few heads each")
    parser.add_argument("--heads", type=int, help="query heads H (default 8)")
    parser.add_argument("--band-length", type=int, help="band length N (default 1024)")
    parser.add_argument("--length", type=int, help="input length T (default: the band length)")
    parser.add_argument("--out", required=True, help="the picture to write, .png")
    parser.add_argument("options", nargs="*", metavar="option=value", help="the type's own options")
    args = parser.parse_args(argv)
    only_for_types = {"--heads": args.heads, "--band-length": args.band_length, "--length": args.length}
    given = [key for key, value in only_for_types.items() if value is not None] + args.options
    if args.type is None and given:
        parser.error(f"{given[0]} goes with --type: --figure and --overview have their own shapes")
    if args.length is not None and args.length < 1:
        parser.error(f"--length {args.length}: must be at least 1")
    args.options = dict(option(parser, text) for text in args.options)
    return args


def option(parser: Parser, text: str) -> tuple[str, Any]:
    """``key=value`` with true, false and whole numbers understood."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        parser.error(f"{text!r} is not option=value, such as local_sharing=true")
    words = {"true": True, "false": False}
    number = value.removeprefix("-").isdecimal()
    return key.removeprefix("attention."), int(value) if number else words.get(value.lower(), value)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with user_errors():
        print(masks.save(picture(args), args.out))


def picture(args: argparse.Namespace) -> Figure:
    if args.overview:
        return masks.overview()
    if args.figure:
        return masks.figure_1() if args.figure == 1 else masks.figure_2()
    heads = 8 if args.heads is None else args.heads
    band_length = 1024 if args.band_length is None else args.band_length
    return masks.draw(build_mask(args.type, n_heads=heads, band_length=band_length, **args.options), args.length)


if __name__ == "__main__":
    main(sys.argv[1:])
