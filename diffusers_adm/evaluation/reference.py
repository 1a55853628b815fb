"""Reference batches: the statistics of a dataset, and some of its images, in the published evaluator's keys."""

import argparse
import json
from pathlib import Path

import numpy as np

from diffusers_adm.data.npz import Rows, write_npz
from diffusers_adm.evaluation.image_sets import add_image_set_arguments, check_changes, open_images
from diffusers_adm.evaluation.metrics import add_extractor_arguments, extractor_from, summarise
from diffusers_adm.evaluation.statistics import NEIGHBOUR


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `make_reference`."""
    parser.add_argument("dataset", help="Hub id, folder of images, dataset's folder, or .npz with arr_0.")
    parser.add_argument("output", help=".npz file to write.")
    parser.add_argument(
        "--num_neighbours",
        type=int,
        default=10_000,
        help="Images to keep in the file, for precision and recall; statistics are of all (default: %(default)s).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the choice of those.")
    add_extractor_arguments(parser)
    add_image_set_arguments(parser)


def make_reference(args: argparse.Namespace) -> None:
    """
    Writes `mu`, `sigma` and, where the extractor has spatial features, `mu_s`, `sigma_s` of all images, `arr_0` of some, and
    `metadata`, a JSON text that says of what.

    Args:
        args: Parsed `add_reference_arguments`.

    Raises:
        ValueError: If the images cannot be used, or there is such a file.
    """
    output = Path(args.output)
    if output.suffix != ".npz" or output.exists() or not output.parent.is_dir():
        raise ValueError(f"{output} must be a new .npz file in a folder that exists.")
    check_changes(args, args.dataset)
    images = open_images(args.dataset, args)
    if args.num_neighbours <= NEIGHBOUR:
        raise ValueError(f"--num_neighbours {args.num_neighbours}: precision and recall need more than {NEIGHBOUR}.")
    extractor = extractor_from(args)
    summary = summarise(images, extractor, args.feature_batch_size, keep=False)
    count = min(args.num_neighbours, images.num_images)
    chosen = np.sort(np.random.default_rng(args.seed).choice(images.num_images, count, replace=False))
    metadata = {
        "dataset": str(args.dataset) if not Path(args.dataset).exists() else Path(args.dataset).name,
        "split": None if Path(args.dataset).suffix == ".npz" else args.split,
        "num_images": images.num_images,
        "size": list(images.shape),
        "crop": args.crop if args.resolution is not None else None,
        "source_resolution": args.source_resolution,
        "feature_extractor": extractor.name,
        "num_neighbours": count,
        "seed": args.seed,
    }
    arrays = {"mu": summary.gaussian.mean, "sigma": summary.gaussian.covariance}
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.covariance}
    arrays["arr_0"] = Rows((count, *images.shape), np.dtype(np.uint8), images.chosen(chosen, args.feature_batch_size))
    arrays["metadata"] = np.array(json.dumps(metadata))
    write_npz(output, arrays)
    print(f"Wrote statistics of {images.num_images} images, and {count} of them, to {output}")
