"""`diffusers-adm convert`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.choices import DTYPES
from diffusers_adm.options import add_examples, add_options, build_options, option, option_values


@dataclass(frozen=True)
class ConvertOptions:
    """Checkpoints to convert, and the folder to write."""

    output: Path = option(metavar="DIR", help="Folder to write. It must be new or empty.")
    released: str | None = option(
        None,
        metavar="NAME",
        help="Released checkpoint to download and convert, with the classifier that guides it, instead of files.",
    )
    accept_license: bool = option(
        False, help="Accept the restrictions of the released checkpoint's license, where they must be accepted."
    )
    unet: Path | None = option(None, metavar="FILE", help="Checkpoint (.pt) of a UNet or an upsampler.")
    classifier: Path | None = option(None, metavar="FILE", help="Checkpoint (.pt) of a classifier.")
    flags: str | None = option(
        None,
        metavar="FLAGS",
        parse=str,
        help='Model flags of the original command line, as one string such as "--image_size 64 ...". Released files are'
        " recognised by name and need no flags.",
    )
    dtype: str | None = option(None, choices=DTYPES, help="Data type of the weights.", unset="as stored")
    variant: str | None = option(
        None, metavar="NAME", help="Variant of the weight files, such as fp16, which is part of their names."
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `convert`."""
    add_options(parser, ConvertOptions, title="conversion")
    add_examples(
        parser,
        "diffusers-adm convert --released imagenet-64 --output adm-64x64",
        "diffusers-adm convert --unet 64x64_diffusion.pt --classifier 64x64_classifier.pt --output adm-64x64",
        'diffusers-adm convert --unet my_unet.pt --flags="--image_size 64 --num_channels 128" --dtype float16 --output my-model',
    )


def convert(args: argparse.Namespace) -> None:
    """
    Converts checkpoints, and prints the folder that was written.

    Raises:
        ValueError: If no checkpoint is given or too many, or they cannot be converted.
    """
    options = build_options(ConvertOptions, args)
    if options.released is None and options.unet is None and options.classifier is None:
        raise ValueError("Nothing to convert: give --released, or --unet, --classifier or both.")
    given = [f"--{name}" for name in ("unet", "classifier", "flags") if getattr(options, name) is not None]
    if options.released is not None and given:
        raise ValueError(f"--released has files and flags of its own: leave out {', '.join(given)}.")

    from diffusers_adm.conversion import convert_checkpoints

    class_name = convert_checkpoints(**option_values(options))
    print(f"Wrote {class_name} to {options.output.resolve()}")
