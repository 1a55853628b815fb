"""`diffusers-adm demo`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.options import add_examples, add_options, at_least, build_options, in_range, option


@dataclass(frozen=True)
class DemoOptions:
    """Picture to draw."""

    photos: bool = option(False, help="Draw small photographs instead of digits.")
    cascade: bool = option(False, help="Draw digits of 16x16 pixels, and enlarge them to 32x32.")
    output: Path = option(Path("demo.png"), metavar="FILE", help="Picture to write, such as demo.png or demo.jpg.")
    steps: int = option(25, help="Number of DDIM steps.", check=at_least(1))
    seed: int = option(
        0, help="Seed of the first column. Each further column has the next seed.", check=in_range(0, 2**32)
    )


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `demo`."""
    add_options(parser, DemoOptions, title="picture")
    add_examples(
        parser,
        "diffusers-adm demo --output demo.png",
        "diffusers-adm demo --photos --output photos.png",
        "diffusers-adm demo --cascade --steps 50 --output cascade.png",
    )


def demo(args: argparse.Namespace) -> None:
    """
    Draws the picture of a model that ships with this package.

    Raises:
        ValueError: If `--photos` and `--cascade` are given together.
    """
    options = build_options(DemoOptions, args)
    if options.photos and options.cascade:
        raise ValueError("Pass at most one of --photos and --cascade.")

    from diffusers_adm.demo import draw_cascade_demo, draw_demo

    if options.cascade:
        draw_cascade_demo(options.output, options.steps, options.seed)
    else:
        draw_demo(options.output, options.steps, options.seed, options.photos)
