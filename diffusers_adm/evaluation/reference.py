"""Reference batches: the statistics of a dataset, and some of its images, in the published evaluator's keys."""

import json
from pathlib import Path

import numpy as np

from diffusers_adm.data.image_sets import ImageSet, ImageSetOptions, NpzImages, open_images
from diffusers_adm.data.npz import NpzFile, Rows, write_npz
from diffusers_adm.evaluation.features import INCEPTION, FeatureExtractor
from diffusers_adm.evaluation.metrics import Summary, summarise
from diffusers_adm.evaluation.statistics import GaussianStatistics


def summarise_reference(
    source: str | Path,
    extractor: FeatureExtractor,
    options: ImageSetOptions | None = None,
    batch_size: int = 64,
) -> Summary:
    """
    Summarises a reference as [`summarise`] does. Statistics that a reference batch holds (`mu`, `sigma`, and `mu_s`, `sigma_s`
    of sFID, as published) are taken from it, and its images serve as neighbours.

    Args:
        source: Reference batch, or a source of images as [`open_images`] takes.
        extractor: Extractor of the features.
        options: Split, place and format of a dataset's images.
        batch_size: Number of images per batch.

    Raises:
        ValueError: If the reference belongs to another extractor, or cannot be compared with.
    """
    if Path(source).suffix != ".npz" or not Path(source).is_file() or "mu" not in NpzFile(source):
        return summarise(open_images(source, options), extractor, batch_size)
    file = NpzFile(source)
    metadata = file.metadata()
    made_by = metadata.get("feature_extractor", INCEPTION)
    if made_by != extractor.name:
        raise ValueError(
            f"{source} holds statistics of {made_by}, and not of {extractor.name}: make one by make-reference."
        )
    gaussian = GaussianStatistics(file.read("mu"), file.read("sigma"))
    spatial = GaussianStatistics(file.read("mu_s"), file.read("sigma_s")) if "mu_s" in file else None
    features, shape = None, None
    if "arr_0" in file:
        images = summarise(NpzImages(source), extractor, batch_size)
        features, shape = images.features, images.shape
        if len(gaussian.mean) != features.pooled.shape[1]:
            raise ValueError(
                f"{source}: its mu has {len(gaussian.mean)} features, and {extractor.name} {features.pooled.shape[1]}."
            )
    return Summary(str(source), gaussian, spatial, metadata.get("num_images"), features, shape, metadata)


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
    Writes `mu`, `sigma` and, if the extractor has spatial features, `mu_s`, `sigma_s` of all images, `arr_0` of some images,
    and `metadata`, a JSON text.

    Args:
        output: Path of the `.npz` file.
        images: Images of the reference.
        extractor: Extractor of the features.
        num_neighbours: Number of images in `arr_0`, or all if there are fewer.
        seed: Seed of their choice.
        batch_size: Number of images per batch.
        metadata: Entries for `metadata`, beside those of the arrays.

    Returns:
        The number of images in `arr_0`.
    """
    summary = summarise(images, extractor, batch_size, keep=False)
    count = min(num_neighbours, images.num_images)
    chosen = np.sort(np.random.default_rng(seed).choice(images.num_images, count, replace=False))
    record = {
        **(metadata or {}),
        "num_images": images.num_images,
        "size": list(images.shape),
        "feature_extractor": extractor.name,
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
