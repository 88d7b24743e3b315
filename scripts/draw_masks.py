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

from matplotlib.figure import Figure

from spattn_olmoe import trust
from spattn_olmoe.errors import Parser, quiet, user_errors, whole
from spattn_olmoe.paper import masks
from spattn_olmoe.patterns import Pattern, build_mask
from spattn_olmoe.settings import parse


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
        print(masks.save(picture(args), args.out))


def picture(args: argparse.Namespace) -> Figure:
    if args.overview:
        return masks.overview()
    if args.figure:
        return masks.figure_1() if args.figure == 1 else masks.figure_2()
    if args.config or args.checkpoint:
        layers, length = patterns_of_run(args)
        return masks.draw_layers(layers, args.length or length)
    options = parse([word.removeprefix("attention.") for word in args.words])
    for key in {"name", "type", "n_heads", "band_length"} & options.keys():
        raise ValueError(f"{key}={options[key]}: is given by --type, --heads and --band-length")
    heads = 8 if args.heads is None else args.heads
    band_length = 1024 if args.band_length is None else args.band_length
    return masks.draw(build_mask(args.type, n_heads=heads, band_length=band_length, **options), args.length)


def patterns_of_run(args: argparse.Namespace) -> tuple[list[Pattern], int]:
    """The pattern of every layer, and the length of training."""
    quiet()
    if args.checkpoint:
        from spattn_olmoe.model.checkpoint import trained_patterns

        return trained_patterns(args.checkpoint)
    from spattn_olmoe.model.section import layer_patterns
    from spattn_olmoe.train.config import load_experiment

    config = load_experiment(args.config, args.words)
    return list(layer_patterns(config.model_with_attention())), config.sequence_length


if __name__ == "__main__":
    main(sys.argv[1:])
