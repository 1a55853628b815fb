"""`diffusers-adm evaluate`."""

import argparse
import dataclasses
from pathlib import Path

from huggingface_hub import ModelCard

from diffusers_adm.atomic_files import write_json
from diffusers_adm.data.image_sets import NO_DATASET, ImageSetOptions, open_images
from diffusers_adm.evaluation.feature_options import FeatureOptions, load_extractor
from diffusers_adm.evaluation.metrics import check_shape, compare, summarise
from diffusers_adm.evaluation.precision_recall import NEIGHBOUR
from diffusers_adm.evaluation.reference import summarise_reference
from diffusers_adm.evaluation.report import add_to_card
from diffusers_adm.options import add_examples, add_options, build_options


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate`."""
    parser.add_argument("reference", help="Reference batch (.npz), or the images themselves, as for the samples.")
    parser.add_argument("samples", help=".npz with arr_0, folder of images, or dataset.")
    parser.add_argument(
        "--samples_split", metavar="TEXT", default="train", help="Split of a dataset of samples. Default: train."
    )
    parser.add_argument("--output", metavar="FILE", help="JSON file to write the metrics to.")
    parser.add_argument(
        "--model_card", metavar="FILE", help="Model card, README.md, to write the metrics to as EvalResults."
    )
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET)
    add_examples(
        parser,
        "diffusers-adm evaluate reference.npz samples/samples_50000x64x64x3.npz --output metrics.json",
        "diffusers-adm evaluate reference.npz my_pictures --resolution 64 --feature_extractor vgg16",
    )


def evaluate(args: argparse.Namespace) -> None:
    """
    Evaluates samples against a reference, and prints the metrics.

    Raises:
        ValueError: If the two cannot be compared.
    """
    # Quick checks come first, so that a mistake shows before features are extracted.
    images = build_options(ImageSetOptions, args)
    images.check(args.samples, args.reference)
    if args.model_card is not None and not Path(args.model_card).is_file():
        raise ValueError(f"--model_card {args.model_card} is no file.")
    card = None if args.model_card is None else ModelCard.load(args.model_card)
    if args.output is not None and not Path(args.output).resolve().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no such folder.")
    # Samples have the small size already.
    format = dataclasses.replace(images.format, source_resolution=None)
    samples = open_images(args.samples, dataclasses.replace(images, split=args.samples_split, format=format))
    if samples.num_images <= NEIGHBOUR:
        raise ValueError(
            f"{args.samples} has {samples.num_images} images; precision and recall need more than {NEIGHBOUR}, and"
            " figures that mean something thousands."
        )
    features = build_options(FeatureOptions, args)
    extractor, batch_size = load_extractor(features), features.feature_batch_size
    reference = summarise_reference(args.reference, extractor, images, batch_size)
    check_shape(reference, samples.shape)
    evaluation = compare(reference, summarise(samples, extractor, batch_size), extractor.name)
    print(evaluation.table())
    if args.output is not None:
        write_json(Path(args.output), evaluation.as_dict())
    if card is not None:
        add_to_card(card, evaluation, Path(args.model_card))
