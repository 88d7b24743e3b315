"""What ``scripts/draw_masks.py`` draws."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import quiet
from ..patterns import Pattern, build_mask
from ..settings import parse
from . import masks


def main(args: argparse.Namespace) -> Path:
    """Draw what the command line asks for, and save it; returns its path."""
    return masks.save(picture(args), args.out)


def picture(args: argparse.Namespace) -> Figure:
    """What the command line asks for.

    :raises ValueError: an option that does not go with it, or that is wrong.
    """
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
    quiet()  # and OLMo-core only now: a named mask does not wait for it
    if args.checkpoint:
        from ..model.checkpoint import trained_patterns

        return trained_patterns(args.checkpoint)
    from ..model.section import layer_patterns
    from ..train.config import load_experiment

    config = load_experiment(args.config, args.words)
    return list(layer_patterns(config.model_with_attention())), config.sequence_length
