"""The paper's metrics (Dhariwal & Nichol 2021, arXiv 2105.05233, section 2.2) of a set of samples against a reference."""

import argparse
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from tqdm.auto import tqdm

from diffusers_adm.atomic_files import atomic_write, write_json
from diffusers_adm.data.npz import NpzFile
from diffusers_adm.evaluation.features import INCEPTION, FeatureExtractor, Features, register_from
from diffusers_adm.evaluation.image_sets import (
    ImageSet,
    NpzImages,
    add_image_set_arguments,
    check_changes,
    open_images,
)
from diffusers_adm.evaluation.statistics import (
    NEIGHBOUR,
    GaussianStatistics,
    RunningStatistics,
    frechet_distance,
    precision_and_recall,
)


# What each figure is called of Inception's features, and of any others: a distance of those is no FID.
METRICS = {
    "frechet_distance": ("FID", "FD"),
    "spatial_frechet_distance": ("sFID", "sFD"),
    "inception_score": ("IS", "IS"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "kernel_distance": ("KID", "KD"),
    "kernel_distance_std": ("KID std", "KD std"),
    "accuracy": ("accuracy", "accuracy"),
}
IMAGES_OF_A_SCORE = 5000
IMAGES_OF_A_SUBSET = 1000


@dataclass
class Summary:
    """
    What the metrics need of a set of images.

    Args:
        name: Of the set.
        gaussian: Of the features.
        spatial: Of the spatial features, or `None`.
        num_images: That `gaussian` and `spatial` are of; `None` if the file does not say.
        features: Of single images, or `None` if there are none.
        shape: `(height, width, channels)` of the images, or `None` if there are none.
        metadata: What the file says of itself.
        mixed: Whether the order of the images says nothing of their classes.
    """

    name: str
    gaussian: GaussianStatistics
    spatial: GaussianStatistics | None
    num_images: int | None
    features: Features | None
    shape: tuple[int, ...] | None
    metadata: dict
    mixed: bool = True


@dataclass
class Evaluation:
    """
    Args:
        metrics: Figures by the names in `METRICS`; those that could not be computed are left out.
        settings: What they were measured of, and with.
        notes: What to know of them.
    """

    metrics: dict[str, float]
    settings: dict
    notes: list[str]

    def label(self, metric: str) -> str:
        """What a figure is called."""
        return metric_label(metric, self.settings["feature_extractor"])

    def table(self) -> str:
        """The figures in Markdown."""
        reference, samples = self.settings["reference"], self.settings["samples"]
        lines = [
            f"| {self.settings['feature_extractor']} | {samples['num_images']} samples |",
            "| --- | --- |",
            *(f"| {self.label(metric)} | {value:.4f} |" for metric, value in self.metrics.items()),
            "",
            f"Samples: {samples['name']}. Reference: {reference['name']}, statistics of {reference['num_images'] or '?'}"
            f" images, neighbours among {reference['num_neighbours'] or 'none'}.",
            *self.notes,
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """For JSON."""
        return {"metrics": self.metrics, "settings": self.settings, "notes": self.notes}

    def eval_results(self) -> list[EvalResult]:
        """The figures as entries of a model card."""
        reference, samples = self.settings["reference"], self.settings["samples"]
        name = Path(reference["name"]).name
        extractor = self.settings["feature_extractor"]
        return [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=reference["metadata"].get("dataset", name),
                dataset_name=name,
                metric_type=self.label(metric).lower().replace(" ", "_"),
                metric_name=f"{self.label(metric)} ({extractor}, {samples['num_images']} samples)",
                metric_value=value,
                metric_args={
                    "feature_extractor": extractor,
                    **{
                        name: samples["metadata"][name]
                        for name in ("scheduler", "call")
                        if name in samples["metadata"]
                    },
                },
            )
            for metric, value in self.metrics.items()
        ]


def metric_label(metric: str, extractor: str) -> str:
    """What a figure of an extractor's features is called."""
    return METRICS[metric][extractor != INCEPTION]


def summarise(images: ImageSet, extractor: FeatureExtractor, batch_size: int = 64, keep: bool = True) -> Summary:
    """
    Extracts the features of all images. Kept are those that neighbours and scores need; the spatial ones are not.

    Args:
        images: To look at.
        extractor: Of their features.
        batch_size: Images at once.
        keep: Whether single images' features are kept; statistics need none, and those of a million do not fit.

    Raises:
        ValueError: If there are fewer than two images, or their features are all the same or not finite.
    """
    gaussian, spatial, kept = RunningStatistics(), RunningStatistics(), []
    total = -(-images.num_images // batch_size)
    for batch in tqdm(images.batches(batch_size), total=total, desc=Path(images.name).name, disable=None):
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
        raise ValueError(f"Features of the {images.name} are all the same.")
    return Summary(
        images.name,
        gaussian,
        spatial.finish() if has_spatial else None,
        images.num_images,
        Features.joined(kept) if keep else None,
        images.shape,
        _metadata(images.file) if isinstance(images, NpzImages) else {},
        images.mixed,
    )


def summarise_reference(
    source: str | Path, extractor: FeatureExtractor, args: argparse.Namespace | None = None, batch_size: int = 64
) -> Summary:
    """
    As [`summarise`], of a reference: the statistics that a reference batch holds (`mu`, `sigma` and of sFID `mu_s`,
    `sigma_s`, as published) are taken from it, and its images serve as neighbours.

    Args:
        source: Reference batch, or what `open_images` takes.
        extractor: Of the features.
        args: Parsed `add_image_set_arguments`; only of a reference that is no `.npz` file.
        batch_size: Images at once.

    Raises:
        ValueError: If it is of another extractor, or there is nothing to compare with.
    """
    if Path(source).suffix != ".npz" or not Path(source).is_file() or "mu" not in NpzFile(source):
        return summarise(open_images(source, args), extractor, batch_size)
    file = NpzFile(source)
    metadata = _metadata(file)
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


def compare(reference: Summary, samples: Summary, extractor_name: str) -> Evaluation:
    """
    All metrics that the two summaries allow.

    Args:
        reference: Of real images.
        samples: Of drawn ones.
        extractor_name: Of both.

    Raises:
        ValueError: If images differ in size or channels, or are too few.
    """
    check_shape(reference, samples.shape)
    notes = []
    metrics = {"frechet_distance": frechet_distance(reference.gaussian, samples.gaussian)}
    counts = [count for count in (samples.num_images, reference.num_images) if count is not None]
    if min(counts) <= len(samples.gaussian.mean):
        notes.append(
            f"{min(counts)} images are no more than there are features, {len(samples.gaussian.mean)}: the covariance is"
            " singular, and distances are too large."
        )
    if reference.spatial is not None and samples.spatial is not None:
        metrics["spatial_frechet_distance"] = frechet_distance(reference.spatial, samples.spatial)
    if samples.features.logits is not None:
        logits = samples.features.logits
        if not samples.mixed and len(logits) > IMAGES_OF_A_SCORE:
            logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
            notes.append("IS: the images are in no order of their own; its parts of 5000 are of a random one.")
        metrics["inception_score"] = inception_score(logits)
    if reference.features is None:
        notes.append("Precision, recall and the kernel distance are left out: the reference has no images (arr_0).")
    else:
        real, drawn = reference.features.pooled, samples.features.pooled
        metrics["precision"], metrics["recall"] = precision_and_recall(real, drawn)
        subset = min(IMAGES_OF_A_SUBSET, len(real), len(drawn))
        kernel = kid_features_to_metric(drawn.cpu(), real.cpu(), kid_subset_size=subset, verbose=False)
        metrics["kernel_distance"] = kernel[KEY_METRIC_KID_MEAN]
        metrics["kernel_distance_std"] = kernel[KEY_METRIC_KID_STD]
        notes.append(f"Kernel distance: mean and standard deviation over 100 subsets of {subset} images.")
    settings = {
        "feature_extractor": extractor_name,
        "reference": {
            "name": reference.name,
            "num_images": reference.num_images,
            "num_neighbours": 0 if reference.features is None else len(reference.features.pooled),
            "metadata": reference.metadata,
        },
        "samples": {"name": samples.name, "num_images": samples.num_images, "metadata": samples.metadata},
    }
    return Evaluation({metric: metrics[metric] for metric in METRICS if metric in metrics}, settings, notes)


def inception_score(logits: torch.Tensor) -> float:
    """
    Mean over parts of 5000 images, in their order, of exp(mean KL(p(y | x) || p(y))) (Salimans et al. 2016, arXiv
    1606.03498), as the published evaluator takes it.

    Args:
        logits: `(images, classes)`.
    """
    parts = [isc_features_to_metric(part.cpu(), splits=1, shuffle=False) for part in logits.split(IMAGES_OF_A_SCORE)]
    return sum(part[KEY_METRIC_ISC_MEAN] for part in parts) / len(parts)


def add_extractor_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `extractor_from`."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--feature_extractor",
        default=INCEPTION,
        help="Name in torch-fidelity's registry (default: %(default)s, the published evaluator's).",
    )
    group.add_argument("--feature_extractor_weights", metavar="FILE", default=None, help="Instead of a download.")
    group.add_argument(
        "--register", metavar="FILE", default=None, help="Python file that registers a feature extractor of your own."
    )
    group.add_argument("--feature_batch_size", type=int, default=64)


def extractor_from(args: argparse.Namespace) -> FeatureExtractor:
    """
    The extractor that the options name, on the fastest device there is.

    Raises:
        ValueError: If there is none of that name, or its weights do not fit.
        OSError: If its weights cannot be fetched.
    """
    if args.feature_batch_size < 1:
        raise ValueError(f"--feature_batch_size {args.feature_batch_size} must be at least 1.")
    if args.register is not None:
        register_from(args.register)
    # Not on Apple's accelerators: they know no float64.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FeatureExtractor(args.feature_extractor, args.feature_extractor_weights, device)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    parser.add_argument("reference", help="Reference batch (.npz), or the images themselves, as for the samples.")
    parser.add_argument("samples", help=".npz with arr_0, folder of images, or dataset.")
    parser.add_argument("--samples_split", default="train", help="Of samples that are a dataset.")
    parser.add_argument("--output", metavar="FILE", default=None, help="JSON file of the figures.")
    parser.add_argument(
        "--model_card", metavar="FILE", default=None, help="Card, README.md, to put the figures into as EvalResults."
    )
    add_extractor_arguments(parser)
    add_image_set_arguments(parser)


def evaluate(args: argparse.Namespace) -> None:
    """
    Measures samples against a reference, and prints the figures.

    Args:
        args: Parsed `add_evaluate_arguments`.

    Raises:
        ValueError: If the two cannot be compared.
    """
    # What is read fast comes first: a mistake shows before the features are extracted.
    check_changes(args, args.samples, args.reference)
    if args.model_card is not None and not Path(args.model_card).is_file():
        raise ValueError(f"--model_card {args.model_card} is no file.")
    card = None if args.model_card is None else ModelCard.load(args.model_card)
    if args.output is not None and not Path(args.output).resolve().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no such folder.")
    # Samples are of the small size already.
    of_samples = {**vars(args), "split": args.samples_split, "source_resolution": None}
    samples = open_images(args.samples, argparse.Namespace(**of_samples))
    if samples.num_images <= NEIGHBOUR:
        raise ValueError(
            f"{args.samples} has {samples.num_images} images; precision and recall need more than {NEIGHBOUR}, and"
            " figures that mean something thousands."
        )
    extractor = extractor_from(args)
    reference = summarise_reference(args.reference, extractor, args, args.feature_batch_size)
    check_shape(reference, samples.shape)
    found = compare(reference, summarise(samples, extractor, args.feature_batch_size), extractor.name)
    print(found.table())
    if args.output is not None:
        write_json(Path(args.output), found.as_dict())
    if card is not None:
        add_to_card(card, found, Path(args.model_card))


def add_to_card(card: ModelCard, found: Evaluation, path: Path) -> None:
    """Puts figures into a card's front matter; those of the same metric, reference and settings are replaced."""
    new = found.eval_results()
    old = card.data.eval_results or []
    card.data.eval_results = [one for one in old if not any(map(one.is_equal_except_value, new))] + new
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    with atomic_write(path) as partial:
        partial.write_text(str(card), encoding="utf-8")


def _metadata(file: NpzFile) -> dict:
    """What `sample` or `make-reference` wrote of a file; other files may have something else of that name."""
    with contextlib.suppress(ValueError):
        found = json.loads(str(file.read("metadata"))) if "metadata" in file else {}
        return found if isinstance(found, dict) else {}
    return {}


def check_shape(reference: Summary, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless samples of a shape, `(height, width, channels)`, can be compared with a reference."""
    if reference.shape is not None and reference.shape != shape:
        raise ValueError(
            f"The reference's images are {_described(reference.shape)}, and the samples {_described(shape)}."
        )


def _described(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} pixels {'grey' if shape[2] == 1 else 'in colour'}"
