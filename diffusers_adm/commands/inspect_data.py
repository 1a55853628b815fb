"""`diffusers-adm inspect-data`."""

import argparse
from dataclasses import dataclass

from diffusers_adm.data.options import ImageFormat, ImageSelection, ImageSource
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option, option_group


@dataclass
class InspectionOptions:
    """Options of `inspect-data`."""

    source: ImageSource = option_group(ImageSource, "dataset")
    format: ImageFormat = option_group(ImageFormat, "image format")
    selection: ImageSelection = option_group(ImageSelection, "training data")
    seed: int = option(
        0, help="Seed that chooses held-out images and those of --max_train_samples.", check=at_least(0)
    )


def add_inspection_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `inspect-data`."""
    add_options(parser, InspectionOptions, title="random choice")
    add_examples(
        parser,
        "diffusers-adm inspect-data --train_data_dir my_images --resolution 64",
        "diffusers-adm inspect-data --dataset_name ylecun/mnist --validation_split test --on_unreadable skip",
    )


def inspect_data(args: argparse.Namespace) -> None:
    """
    Prints the classes and their counts, sizes, modes and unreadable files of training images and of held-out images.

    Args:
        args: Parsed arguments of `add_inspection_arguments`.

    Raises:
        ValueError: If the dataset cannot be used.
    """
    options = build_options(InspectionOptions, args)
    if options.selection.streaming:
        raise ValueError("inspect-data reads all images, so --streaming is not supported. Leave it out.")

    from diffusers_adm.data.datasets import load_images
    from diffusers_adm.training.inspection import print_summary

    images, held_out = load_images(options.source, options.format, options.selection, seed=options.seed)
    print_summary("Training", images)
    if held_out is not None:
        print_summary("Held out", held_out)
