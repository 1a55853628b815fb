"""Reference batches: statistics of a dataset and some of its images, in `.npz` files with the keys of the original code."""

import json
from pathlib import Path

import numpy as np
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffusers_adm.data.image_sets import ImageSet, NpzImages, open_images
from diffusers_adm.data.npz import NpzFile, Rows, write_npz
from diffusers_adm.data.options import ImageSetOptions
from diffusers_adm.evaluation.feature_options import INCEPTION
from diffusers_adm.evaluation.features import FeatureExtractor
from diffusers_adm.evaluation.metrics import Summary, check_shape, summarise
from diffusers_adm.evaluation.statistics import GaussianStatistics
from diffusers_adm.records import weights_digest


def summarise_reference(
    source: str | Path,
    extractor: FeatureExtractor,
    options: ImageSetOptions | None = None,
    batch_size: int = 64,
    shape: tuple[int, int, int] | None = None,
) -> Summary:
    """
    Summarises a reference. If it is a reference batch, its statistics are read from the file: `mu` and `sigma`, and `mu_s` and
    `sigma_s` for sFID. Its images are used for precision, recall and kernel distance. Otherwise, all images are summarised by
    [`summarise`].

    Args:
        source: Reference batch, or a source of images that [`open_images`] supports.
        extractor: Extractor of the features.
        options: Split, place and format of a dataset's images.
        batch_size: Number of images per batch.
        shape: Shape of the samples that will be compared, `(height, width, channels)`. `None` means any.

    Raises:
        ValueError: If the reference was made with another extractor, has images of another shape, or is not usable.
    """
    if not holds_statistics(source):
        images = open_images(source, options)
        check_shape(images.shape, shape)  # before features are extracted
        return summarise(images, extractor, batch_size)
    check_extractor(source, extractor.name)
    file = NpzFile(source)
    metadata = file.metadata()
    made_with = metadata.get("weights")
    if made_with is not None and made_with != weights_digest({"extractor": extractor.network}):
        raise ValueError(
            f"{source} was made with other weights of the feature extractor {extractor.name}. Pass their file with"
            " --feature_extractor_weights, or run make-reference again."
        )
    num_images = metadata.get("num_images")
    if num_images is not None and type(num_images) is not int:
        raise ValueError(f"`num_images` in the metadata of {source} must be an integer, but got {num_images!r}.")
    gaussian = read_statistics(file, "mu", "sigma")
    spatial = read_statistics(file, "mu_s", "sigma_s") if "mu_s" in file else None
    features, own_shape = None, None
    if "arr_0" in file:
        images = NpzImages(source)
        check_shape(images.shape, shape)
        features, own_shape = summarise(images, extractor, batch_size).features, images.shape
        if len(gaussian.mean) != features.pooled.shape[1]:
            raise ValueError(
                f"mu in {source} must have {features.pooled.shape[1]} features, as {extractor.name} has, but it has"
                f" {len(gaussian.mean)}."
            )
    return Summary(str(source), gaussian, spatial, num_images, features, own_shape, metadata)


def holds_statistics(source: str | Path) -> bool:
    """Returns whether a source is a reference batch with statistics, instead of images alone."""
    return Path(source).suffix == ".npz" and Path(source).is_file() and "mu" in NpzFile(source)


def check_extractor(source: str | Path, extractor_name: str) -> None:
    """
    Checks that a reference batch was made with an extractor. Images can be compared with any extractor.

    Raises:
        ValueError: If the reference batch was made with another extractor.
    """
    if not holds_statistics(source):
        return
    made_by = str(NpzFile(source).metadata().get("feature_extractor", INCEPTION))
    if made_by == extractor_name:
        return
    register = "" if made_by in FEATURE_EXTRACTORS_REGISTRY else " and --register FILE, the file that registers it"
    raise ValueError(
        f"{source} was made with the feature extractor {made_by}, but --feature_extractor is {extractor_name}. Pass"
        f" --feature_extractor {made_by}{register}, or run make-reference with {extractor_name}."
    )


def read_statistics(file: NpzFile, mean: str, covariance: str) -> GaussianStatistics:
    """
    Reads statistics from two arrays of a file.

    Raises:
        ValueError: If an array is missing, or the arrays are not a mean and a covariance.
    """
    arrays = file.read(mean), file.read(covariance)
    try:
        return GaussianStatistics(*arrays)
    except ValueError as error:
        raise ValueError(f"{file.path} has invalid statistics ({mean}, {covariance}): {error}") from error


def write_reference(
    output: Path,
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    num_neighbours: int,
    seed: int = 0,
    batch_size: int = 64,
    metadata: dict | None = None,
) -> int:
    """
    Writes a reference batch: the statistics of all images (`mu` and `sigma`, and `mu_s` and `sigma_s` if the extractor has spatial
    features), some of the images (`arr_0`), and a JSON text (`metadata`).

    Args:
        output: Path of the `.npz` file.
        images: Images of the reference.
        extractor: Extractor of the features.
        num_neighbours: Number of images in `arr_0`. If there are fewer images, all are written.
        seed: Seed of the random choice of these images.
        batch_size: Number of images per batch.
        metadata: Additional entries of `metadata`.

    Returns:
        Number of images in `arr_0`.
    """
    summary = summarise(images, extractor, batch_size, keep=False)
    count = min(num_neighbours, images.num_images)
    chosen = np.sort(np.random.default_rng(seed).choice(images.num_images, count, replace=False))
    record = {
        **(metadata or {}),
        "num_images": images.num_images,
        "size": list(images.shape),
        "feature_extractor": extractor.name,
        "weights": weights_digest({"extractor": extractor.network}),
        "num_neighbours": count,
        "seed": seed,
    }
    arrays = {"mu": summary.gaussian.mean, "sigma": summary.gaussian.covariance}
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.covariance}
    arrays["arr_0"] = Rows((count, *images.shape), np.dtype(np.uint8), images.chosen(chosen, batch_size))
    arrays["metadata"] = np.array(json.dumps(record))
    write_npz(output, arrays)
    return count
