"""Sweep over guidance scales, steps and schedulers, which shows the trade-off between fidelity and diversity (Dhariwal & Nichol
2021, arXiv 2105.05233, section 4.3 and Table 4)."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import torch

from diffusers_adm.atomic_files import write_json
from diffusers_adm.command_line import noted_failure
from diffusers_adm.data.npz_images import NpzImages
from diffusers_adm.data.options import ImageSetOptions
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.features import FeatureExtractor, load_extractor
from diffusers_adm.evaluation.metrics import Summary, compare, summarise
from diffusers_adm.evaluation.plots import Line, save_lines
from diffusers_adm.evaluation.reference import summarise_reference
from diffusers_adm.evaluation.report import metric_label, write_tables
from diffusers_adm.evaluation.sampling import draw_samples, labels_of_run, open_low_res, run_options
from diffusers_adm.evaluation.schedulers import SamplingPipeline, set_scheduler
from diffusers_adm.launch import join_processes
from diffusers_adm.records import as_record, weights_digest


PLOTTED = ("frechet_distance", "spatial_frechet_distance", "inception_score", "precision", "recall")


class PointEvaluator:
    """
    Compares samples with a reference. The metrics are saved in the folder of the samples. They are computed again only if the samples,
    the reference or the extractor have changed.

    Args:
        reference: Summary of the reference.
        extractor: Extractor of the features.
        batch_size: Number of images per batch.
        judged: Whether to add `"accuracy"` of samples with labels: the fraction whose label is the extractor's most likely class.
    """

    def __init__(self, reference: Summary, extractor: FeatureExtractor, batch_size: int = 64, judged: bool = False):
        self.reference = reference
        self.extractor = extractor
        self.batch_size = batch_size
        self.judged = judged
        digest = hashlib.sha256()
        for gaussian in filter(None, (reference.gaussian, reference.spatial)):
            digest.update(gaussian.mean.tobytes() + gaussian.covariance.tobytes())
        if reference.features is not None:
            digest.update(reference.features.pooled.cpu().numpy().tobytes())
        self.key = {
            "feature_extractor": extractor.name,
            "weights": weights_digest({"extractor": extractor.network}),
            "reference": digest.hexdigest(),
            "judged": judged,
        }

    def __call__(self, samples: Path) -> dict:
        """
        Returns the metrics of samples, their settings and notes.

        Args:
            samples: Path of an `.npz` file.
        """
        path = samples.with_name(f"metrics_{samples.stem}.json")
        images = NpzImages(samples, labelled=self.judged)
        key = {**self.key, "samples": images.fingerprint}
        if path.is_file():
            kept = as_record(json.loads(path.read_text(encoding="utf-8")))
            if kept["key"] == key and not any(isinstance(value, str) for value in kept["metrics"].values()):
                return kept
        summary = summarise(images, self.extractor, self.batch_size)
        result = {**compare(self.reference, summary, self.extractor.name).as_dict(), "key": key}
        if images.labels is not None:
            right = summary.features.logits.argmax(dim=1).cpu() == torch.from_numpy(images.labels)
            result["metrics"]["accuracy"] = right.double().mean().item()
        write_json(path, result)
        return result


def build_evaluator(
    reference: str | Path,
    images: ImageSetOptions,
    features: FeatureOptions,
    shape: tuple[int, int, int],
    judged: bool = False,
) -> PointEvaluator:
    """
    Loads the extractor and summarises the reference.

    Args:
        reference: Reference batch, or a source of images.
        images: Split, place and format of the images of a dataset.
        features: Extractor of the features.
        shape: Shape of the samples, `(height, width, channels)`.
        judged: Whether samples are judged by their labels.

    Raises:
        ValueError: If samples of the shape cannot be compared with the reference, or the extractor cannot judge them.
    """
    extractor = load_extractor(features)
    if judged and not extractor.has_logits:
        raise ValueError(
            f"Judging samples (--judged) requires a feature extractor that is a classifier, but {features.feature_extractor} has no"
            " logits. Choose another --feature_extractor."
        )
    summary = summarise_reference(reference, extractor, images, features.feature_batch_size, shape)
    return PointEvaluator(summary, extractor, features.feature_batch_size, judged)


def check_points(
    pipeline: SamplingPipeline,
    axes: dict[str, list],
    judged: bool,
    *,
    num_images: int,
    seed: int = 0,
    labels: str | None = None,
    low_res: str | Path | None = None,
    **_,
) -> list[dict]:
    """
    Returns the combinations (points) of some options, after a check of each.

    Args:
        pipeline: Pipeline of the sweep.
        axes: Values of each option, see [`sweep_points`].
        judged: Whether samples are judged by their labels.
        num_images: Number of images per point.
        seed: Seed of the samples.
        labels: Labels of the images, see [`draw_samples`].
        low_res: Path of the images that an upsampler enlarges.

    Raises:
        ValueError: If a point cannot be drawn, or no point draws a requested class that can be judged.
    """
    stock_scheduler, small = pipeline.scheduler, None
    if axes.get("scheduler", [None]) == [None]:
        axes = {**axes, "scheduler": [type(stock_scheduler).__name__.removesuffix("Scheduler")]}
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    if low_res is not None:
        small = open_low_res(low_res, pipeline, num_images)
    labelled = False
    try:
        for point in points:
            pipeline.scheduler = stock_scheduler
            set_scheduler(pipeline, point["scheduler"])
            options = run_options(pipeline, call_of(point))
            labelled |= labels_of_run(labels, pipeline, options, small, seed, num_images).num_classes is not None
    finally:
        pipeline.scheduler = stock_scheduler
    if judged and not labelled:
        raise ValueError("--judged requires labels, but no point of this sweep draws a requested class. Leave it out.")
    return points


def sweep_points(
    pipeline: SamplingPipeline, axes: dict[str, list], folder: Path, evaluate: PointEvaluator | None, **run
) -> list[dict]:
    """
    Draws and evaluates samples for each combination (point) of some options. It writes `results.csv`, `results.md`, `results.json` and
    the plots of the paper. Points that an earlier run has evaluated are kept. All launched processes draw, and the main process
    evaluates.

    Args:
        pipeline: Pipeline on this process's device.
        axes: Values of each option of the pipeline's call. Values of `"scheduler"` are names in `SCHEDULERS`, or `None`.
        folder: Folder of the sweep, on a disk that all processes can read and write.
        evaluate: [`PointEvaluator`] of the main process.
        run: Other arguments of [`draw_samples`].

    Returns:
        Result of each point on the main process, and an empty list on other processes.

    Raises:
        ValueError: If a point cannot be drawn, or the folder of a point belongs to a run with other settings. With one process, all other
            points have been evaluated.
    """
    state = join_processes()
    # All points are checked before the first one is drawn.
    points = check_points(pipeline, axes, evaluate is not None and evaluate.judged, **run)
    stock_scheduler, results, failures = pipeline.scheduler, [], []
    for number, point in enumerate(points):
        if state.is_main_process:
            print(f"Point {number + 1} of {len(points)}: {described(point)}", flush=True)
        pipeline.scheduler = stock_scheduler
        set_scheduler(pipeline, point["scheduler"])
        with noted_failure(described(point), failures, alone=state.num_processes == 1):
            samples = draw_samples(pipeline, folder / "points" / folder_name(point), call=call_of(point), **run)
            if state.is_main_process:
                results.append({"point": point, **evaluate(samples)})
                write_tables(folder, results)
        state.wait_for_everyone()
    if results:
        plot_trade_off(folder / "trade-off.png", results, axes)
    if failures:
        others = f" All others are in {folder}." if results else ""
        raise ValueError(f"{len(failures)} of {len(points)} points failed: {'; '.join(failures)}.{others}")
    return results


def call_of(point: dict) -> dict:
    """Returns the arguments of the pipeline's call at a point."""
    return {name: value for name, value in point.items() if name != "scheduler"}


def folder_name(point: dict) -> str:
    """Returns a readable and unique folder name for a point."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub('[/:]', '-', '_'.join(map(str, point.values())))[:80]}_{digest}"


def described(point: dict) -> str:
    """Returns a description of a point."""
    return ", ".join(f"{name} {value}" for name, value in point.items())


def is_number(value) -> bool:
    """Returns whether a value can be plotted on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plot_trade_off(path: Path, results: list[dict], axes: dict[str, list]) -> None:
    """
    Plots each metric over the guidance scale, and precision over recall. If the guidance scale does not vary, metrics are plotted over
    the first numeric option that varies.

    Args:
        path: Path of the PNG file.
        results: Results of [`sweep_points`].
        axes: Values of each option.
    """
    extractor = results[0]["settings"]["feature_extractor"]
    metrics = [metric for metric in PLOTTED if all(metric in result["metrics"] for result in results)]
    several = [name for name, values in axes.items() if len(values) > 1]
    numbers = [name for name in several if all(map(is_number, axes[name]))]
    if not numbers:
        path.unlink(missing_ok=True)  # an earlier sweep of other options may have left it
        return
    horizontal = "guidance_scale" if "guidance_scale" in numbers else numbers[0]
    groups: dict[str, list[dict]] = {}
    for result in sorted(results, key=lambda result: result["point"][horizontal]):
        others = {name: result["point"][name] for name in several if name != horizontal}
        groups.setdefault(described(others), []).append(result)

    def lines(vertical: str, x: str | None = None) -> dict[str, Line]:
        return {
            name: (
                [result["point"][horizontal] if x is None else result["metrics"][x] for result in group],
                [result["metrics"][vertical] for result in group],
            )
            for name, group in groups.items()
        }

    panels = [(metric_label(metric, extractor), horizontal, lines(metric)) for metric in metrics]
    if "recall" in metrics:
        panels.append(("precision", "recall", lines("precision", "recall")))
    save_lines(path, panels)
