"""Metrics of the paper that compare samples with a reference (Dhariwal & Nichol 2021, arXiv 2105.05233, section 2.2)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from diffusers_adm.data.image_sets import ImageSet, NpzImages
from diffusers_adm.evaluation.features import FeatureExtractor, Features
from diffusers_adm.evaluation.precision_recall import precision_and_recall
from diffusers_adm.evaluation.report import METRICS, Evaluation
from diffusers_adm.evaluation.statistics import GaussianStatistics, RunningStatistics, frechet_distance
from diffusers_adm.progress import with_progress
from diffusers_adm.records import as_record


IMAGES_OF_A_SCORE = 5000
IMAGES_OF_A_SUBSET = 1000
NUM_SUBSETS = 100  # of the kernel distance


@dataclass
class Summary:
    """
    Statistics and features of a set of images, from which metrics are computed.

    Args:
        name: Name of the set.
        gaussian: Statistics of the features.
        spatial: Statistics of the spatial features, or `None`.
        num_images: Number of images in the statistics, or `None` if it is unknown.
        features: Features of each image, or `None` for statistics without images.
        shape: Shape of the images, `(height, width, channels)`, or `None` for statistics without images.
        metadata: Metadata that the file of the images stores.
        mixed: Whether the order of the images is independent of their classes.
    """

    name: str
    gaussian: GaussianStatistics
    spatial: GaussianStatistics | None
    num_images: int | None
    features: Features | None
    shape: tuple[int, ...] | None
    metadata: dict
    mixed: bool = True


def summarise(images: ImageSet, extractor: FeatureExtractor, batch_size: int = 64, keep: bool = True) -> Summary:
    """
    Extracts the features of all images and computes their statistics.

    Args:
        images: Images to summarise.
        extractor: Extractor of the features.
        batch_size: Number of images per batch.
        keep: Whether to keep the features of each image, except the spatial ones. Precision, recall, Inception score and kernel
            distance need them. The features of a million images do not fit into memory.

    Raises:
        ValueError: If there are fewer than two images, or their features are all the same or not finite.
    """
    gaussian, spatial, kept = RunningStatistics(), RunningStatistics(), []
    total = -(-images.num_images // batch_size)
    for batch in with_progress(images.batches(batch_size), total, f"features of {Path(images.name).name}", "batches"):
        features = extractor(batch)
        gaussian.update(features.pooled)
        has_spatial = features.spatial is not None
        if has_spatial:
            spatial.update(features.spatial)
            features.spatial = None
        if keep:
            kept.append(features)
    gaussian = gaussian.finish()
    if not gaussian.covariance.any():
        raise ValueError(f"The features of {images.name} must differ, but all are the same.")
    return Summary(
        images.name,
        gaussian,
        spatial.finish() if has_spatial else None,
        images.num_images,
        Features.joined(kept) if keep else None,
        images.shape,
        images.file.metadata() if isinstance(images, NpzImages) else {},
        images.mixed,
    )


def compare(reference: Summary, samples: Summary, extractor_name: str) -> Evaluation:
    """
    Computes all metrics that the two summaries allow.

    Args:
        reference: Summary of real images.
        samples: Summary of drawn images.
        extractor_name: Extractor of both summaries.

    Raises:
        ValueError: If samples and reference differ in size or channels, or there are too few images.
    """
    check_shape(reference.shape, samples.shape)
    notes = []
    metrics = {"frechet_distance": frechet_distance(reference.gaussian, samples.gaussian)}
    counts = [count for count in (samples.num_images, reference.num_images) if count is not None]
    if min(counts) <= len(samples.gaussian.mean):
        notes.append(
            f"Distances are too large, because {min(counts)} images are too few for {len(samples.gaussian.mean)} features: the"
            " covariance is singular."
        )
    if reference.spatial is not None and samples.spatial is not None:
        metrics["spatial_frechet_distance"] = frechet_distance(reference.spatial, samples.spatial)
    if samples.features is not None and samples.features.logits is not None:
        logits = samples.features.logits
        if not samples.mixed and len(logits) > IMAGES_OF_A_SCORE:
            logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
            notes.append("IS is computed from random parts of 5000 images, because the images may be sorted by class.")
        metrics["inception_score"] = inception_score(logits)
        if len(logits) > IMAGES_OF_A_SCORE and len(logits) % IMAGES_OF_A_SCORE:
            notes.append(
                f"IS is the mean over parts of {IMAGES_OF_A_SCORE} images, but the last part has only"
                f" {len(logits) % IMAGES_OF_A_SCORE}, which lowers it. Draw a multiple of {IMAGES_OF_A_SCORE} images."
            )
    if reference.features is None or samples.features is None:
        missing = "the reference has no images (arr_0)" if reference.features is None else "features were not kept"
        notes.append(f"Precision, recall and kernel distance are left out, because {missing}.")
    else:
        real, drawn = reference.features.pooled, samples.features.pooled
        metrics["precision"], metrics["recall"] = precision_and_recall(real, drawn)
        kernel, note = kernel_distance(real, drawn)
        metrics |= kernel
        notes.append(note)
    settings = comparison_settings(reference, samples, extractor_name)
    return Evaluation({metric: metrics[metric] for metric in METRICS if metric in metrics}, settings, notes)


def comparison_settings(reference: Summary, samples: Summary, extractor_name: str) -> dict:
    """Returns the extractor, reference and samples of a comparison, for its record."""
    return {
        "feature_extractor": extractor_name,
        "reference": {
            "name": reference.name,
            "num_images": reference.num_images,
            "num_neighbours": 0 if reference.features is None else len(reference.features.pooled),
            "metadata": as_record(reference.metadata),
        },
        "samples": {"name": samples.name, "num_images": samples.num_images, "metadata": as_record(samples.metadata)},
    }


def kernel_distance(real: torch.Tensor, drawn: torch.Tensor) -> tuple[dict[str, float], str]:
    """Returns the mean of the kernel distance over subsets, its standard deviation if the subsets differ, and a note about them."""
    subset = min(IMAGES_OF_A_SUBSET, len(real), len(drawn))
    subsets = 1 if subset == max(len(real), len(drawn)) else NUM_SUBSETS
    distances = kid_features_to_metric(
        drawn.cpu(), real.cpu(), kid_subset_size=subset, kid_subsets=subsets, verbose=False
    )
    found = {"kernel_distance": distances[KEY_METRIC_KID_MEAN]}
    if subsets == 1:
        return found, f"The kernel distance is that of all {subset} images."
    note = f"The kernel distance is the mean over {subsets} subsets of {subset} images, with its standard deviation."
    return {**found, "kernel_distance_std": distances[KEY_METRIC_KID_STD]}, note


def inception_score(logits: torch.Tensor) -> float:
    """
    Returns the Inception score exp(mean KL(p(y | x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498). It is the mean of the scores
    of consecutive parts of 5000 images, as in the evaluator of the original code.

    Args:
        logits: Logits of the images, `(images, classes)`.
    """
    parts = [isc_features_to_metric(part.cpu(), splits=1, shuffle=False) for part in logits.split(IMAGES_OF_A_SCORE)]
    return sum(part[KEY_METRIC_ISC_MEAN] for part in parts) / len(parts)


def check_shape(reference: tuple[int, ...] | None, samples: tuple[int, ...] | None) -> None:
    """Raises a ValueError if images of two shapes, `(height, width, channels)`, cannot be compared. `None` is an unknown shape."""
    if None not in (reference, samples) and reference != samples:
        raise ValueError(
            f"The samples must have the size and channels of the reference, {_described(reference)}, but have"
            f" {_described(samples)}. --resolution and --in_channels convert images of folders and datasets."
        )


def _described(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} pixels {'in grey' if shape[2] == 1 else 'in colour'}"
