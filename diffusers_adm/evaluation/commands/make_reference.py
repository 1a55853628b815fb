"""`diffusers-adm make-reference`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.atomic_files import check_can_write
from diffusers_adm.data.options import NO_DATASET, ImageSetOptions
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.options import NEIGHBOUR
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option, option_values, text_as


@dataclass(frozen=True)
class ReferenceOptions:
    """Images that the file keeps."""

    num_neighbours: int = option(
        10_000,
        help="Number of images to keep in the file, for precision and recall. The statistics cover all images.",
        check=at_least(NEIGHBOUR + 1),
    )
    seed: int = option(0, help="Seed of the choice of images to keep.", check=at_least(0))


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `make_reference`."""
    parser.add_argument(
        "dataset",
        type=text_as(),
        metavar="DATASET",
        help="Images: the Hub id or folder of a dataset, a folder of images, or an .npz file with arr_0. Required.",
    )
    parser.add_argument("output", type=text_as(), metavar="OUTPUT", help="New .npz file to write. Required.")
    add_options(parser, ReferenceOptions, title="reference")
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET, title="images")
    add_examples(
        parser,
        "diffusers-adm make-reference my_images reference.npz --resolution 64",
        "diffusers-adm make-reference ylecun/mnist reference.npz --split test --resolution 32 --crop pad",
    )


def make_reference(args: argparse.Namespace) -> None:
    """
    Writes a reference batch: statistics of all images of a dataset, and some of the images.

    Raises:
        ValueError: If the images cannot be used, or the file exists.
    """
    output = Path(args.output)
    if output.suffix != ".npz" or output.exists():
        raise ValueError(f"OUTPUT must be the name of a new .npz file, but got {output}.")
    check_can_write(output)
    options, kept, features = (build_options(cls, args) for cls in (ImageSetOptions, ReferenceOptions, FeatureOptions))
    options.check(args.dataset)

    from diffusers_adm.data.image_sets import open_images
    from diffusers_adm.evaluation.features import load_extractor
    from diffusers_adm.evaluation.reference import write_reference

    images = open_images(args.dataset, options)
    count = write_reference(
        output,
        images,
        load_extractor(features),
        **option_values(kept),
        batch_size=features.feature_batch_size,
        metadata={
            "dataset": str(args.dataset) if not Path(args.dataset).exists() else Path(args.dataset).name,
            "split": None if Path(args.dataset).suffix == ".npz" else options.split,
            "crop": options.format.crop if options.format.resolution is not None else None,
            "source_resolution": options.format.source_resolution,
        },
    )
    print(f"Wrote the statistics of {images.num_images} images, and {count} of the images, to {output}.")
