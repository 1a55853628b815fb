"""`diffusers-adm evaluate`."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_adm.atomic_files import check_can_write, write_json
from diffusers_adm.data.options import DEFAULT_SPLIT, NO_DATASET, ImageSetOptions
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.options import NEIGHBOUR
from diffusers_adm.options import add_examples, add_options, build_options, option, text_as


@dataclass(frozen=True)
class EvaluateOptions:
    """Samples to evaluate, and files to write."""

    samples_split: str = option(DEFAULT_SPLIT, help="Split of the samples, if they are a dataset.")
    output: Path | None = option(
        None, metavar="FILE", help="JSON file to write the metrics to.", unset="they are only printed"
    )
    model_card: Path | None = option(
        None, metavar="FILE", help="Model card (README.md) of a pipeline to write the metrics to."
    )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate`."""
    parser.add_argument(
        "reference",
        type=text_as(),
        metavar="REFERENCE",
        help="Reference batch of make-reference (.npz), or images, as for SAMPLES. Required.",
    )
    parser.add_argument(
        "samples",
        type=text_as(),
        metavar="SAMPLES",
        help="Samples: an .npz file with arr_0, a folder of images, or the Hub id or folder of a dataset. Required.",
    )
    add_options(parser, EvaluateOptions, title="evaluation")
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET, title="images")
    add_examples(
        parser,
        "diffusers-adm evaluate reference.npz samples/samples_50000x64x64x3.npz --output metrics.json",
        "diffusers-adm evaluate reference.npz my_pictures --resolution 64 --feature_extractor vgg16",
    )


def check_splits(args: argparse.Namespace, images: ImageSetOptions, options: EvaluateOptions) -> None:
    """Raises a ValueError if a split is given for an `.npz` file, which has no splits."""
    for name, split, source in (
        ("split", images.split, args.reference),
        ("samples_split", options.samples_split, args.samples),
    ):
        if split != DEFAULT_SPLIT and Path(source).suffix == ".npz":
            raise ValueError(f"--{name} {split} requires a dataset, but got the .npz file {source}.")


def sample_options(args: argparse.Namespace, images: ImageSetOptions, options: EvaluateOptions) -> ImageSetOptions:
    """
    Returns the options of the samples, which are not shrunk, because they have the size of the model's images. If the samples are a
    folder and the reference is another dataset, options such as `image_column` apply to the reference only.
    """
    source = images.source
    if Path(args.reference).suffix != ".npz" and Path(args.samples).is_dir() and args.samples != args.reference:
        source = replace(source, image_column=None, data_files=None, dataset_config_name=None, dataset_revision=None)
    format = replace(images.format, source_resolution=None)
    return replace(images, split=options.samples_split, source=source, format=format)


def evaluate(args: argparse.Namespace) -> None:
    """
    Compares samples with a reference, and prints the metrics.

    Raises:
        ValueError: If the two cannot be compared.
    """
    # Quick checks come first, so that a mistake shows before features are extracted.
    images, options, features = (
        build_options(cls, args) for cls in (ImageSetOptions, EvaluateOptions, FeatureOptions)
    )
    images.check(args.samples, args.reference)
    check_splits(args, images, options)
    if options.output is not None:
        check_can_write(options.output)

    from diffusers_adm.data.image_sets import open_images
    from diffusers_adm.evaluation.features import load_extractor
    from diffusers_adm.evaluation.metrics import compare, summarise
    from diffusers_adm.evaluation.reference import check_extractor, holds_statistics, summarise_reference
    from diffusers_adm.evaluation.report import add_to_card, read_card

    card = None if options.model_card is None else read_card(options.model_card)
    if holds_statistics(args.samples) and not holds_statistics(args.reference):
        raise ValueError(
            f"SAMPLES must be samples, but {args.samples} is a reference batch, which has statistics. Pass REFERENCE first."
        )
    samples = open_images(args.samples, sample_options(args, images, options))
    if samples.num_images <= NEIGHBOUR:
        raise ValueError(
            f"SAMPLES must have more than {NEIGHBOUR} images for precision and recall, and thousands for meaningful figures,"
            f" but {args.samples} has {samples.num_images} images."
        )
    check_extractor(args.reference, features.feature_extractor)
    extractor, batch_size = load_extractor(features), features.feature_batch_size
    reference = summarise_reference(args.reference, extractor, images, batch_size, samples.shape)
    evaluation = compare(reference, summarise(samples, extractor, batch_size), extractor.name)
    # Files are written first, because printing fails if the program that reads the output has ended.
    if options.output is not None:
        write_json(options.output, evaluation.as_dict())
    if card is not None:
        add_to_card(card, evaluation, options.model_card)
    print(evaluation.table())
    written = [str(path) for path in (options.output, options.model_card) if path is not None]
    if written:
        print(f"\nWrote the metrics to {' and '.join(written)}.")
