"""Evaluation of points: samples of some settings, their quality and their cost."""

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn.modules.module import register_module_forward_pre_hook

from diffusers_adm.command_line import CommandParser
from diffusers_adm.data.options import NO_DATASET, ImageSetOptions
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.options import MAX_IMAGES, NEIGHBOUR, ModelOptions, RunOptions
from diffusers_adm.evaluation.reference import check_extractor
from diffusers_adm.evaluation.report import write_tables
from diffusers_adm.evaluation.sampling import draw_samples, image_shape, load_pipeline, run_options
from diffusers_adm.evaluation.schedulers import SamplingPipeline, set_scheduler
from diffusers_adm.evaluation.sweep import PointEvaluator, build_evaluator, folder_name
from diffusers_adm.launch import join_processes
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.options import add_options, build_options, in_range, option, option_values, text_as


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Samples of each point."""

    output: Path = option(metavar="DIR", help="Folder of the run: a new folder, or that of an interrupted run.")
    num_samples: int = option(1000, help="Number of images per point.", check=in_range(NEIGHBOUR + 1, MAX_IMAGES))


@dataclasses.dataclass(frozen=True)
class Settings:
    """
    Settings that all points share.

    Args:
        num_images: Number of images per point.
        batch_size: Number of images per batch.
        seed: Seed of the points that are compared. The best points are also evaluated with the next seeds.
        model_name: Folder or Hub id of the pipeline, for the record.
    """

    num_images: int = 1000
    batch_size: int = 50
    seed: int = 0
    model_name: str | None = None


class Points:
    """
    Evaluation of points of quality and cost, whose results are saved in a folder.

    Args:
        pipeline: Pipeline with a classifier, on this process's device.
        evaluator: Evaluator of samples with `judged=True`, on the main process.
        folder: Folder of the run, on a disk that all processes can read and write.
        settings: Settings that all points share.
    """

    def __init__(
        self,
        pipeline: SamplingPipeline,
        evaluator: PointEvaluator | None,
        folder: Path,
        settings: Settings = Settings(),
    ):
        self.pipeline = pipeline
        self.stock_scheduler = pipeline.scheduler
        self.evaluator = evaluator
        self.folder = folder
        self.settings = settings
        self.state = PartialState()
        self.results: list[dict] = []

    def set_scheduler(self, scheduler: str) -> None:
        """Replaces the pipeline's scheduler."""
        self.pipeline.scheduler = self.stock_scheduler
        set_scheduler(self.pipeline, scheduler)

    def evaluate_point(self, point: dict, scheduler: str, call: dict, num_images: int | None = None) -> dict:
        """
        Draws and evaluates the samples of a point, and writes the table of all points so far.

        Args:
            point: Entries of the point in the table. `seed` is the seed of the samples.
            scheduler: Name in `SCHEDULERS`.
            call: Arguments of the pipeline's call.
            num_images: Number of images. `None` means that of the settings.

        Returns:
            Point and its metrics.
        """
        self.set_scheduler(scheduler)
        samples = draw_samples(
            self.pipeline,
            self.folder / "points" / folder_name(point),
            num_images=num_images or self.settings.num_images,
            batch_size=self.settings.batch_size,
            seed=point["seed"],
            labels="balanced",
            call=call,
            model_name=self.settings.model_name,
        )
        unet, classifier = evaluations(self.pipeline, call)
        metrics = [self.evaluator(samples) if self.state.is_main_process else None]
        broadcast_object_list(metrics)  # all processes need them to choose the same points
        result = {**metrics[0], "point": {**point, "UNet": unet, "classifier": classifier}}
        self.results.append(result)
        if self.state.is_main_process:
            write_tables(self.folder, self.results)
        return result


def distance(result: dict) -> float:
    """Returns the Frechet distance of a point, which decides what the best points are."""
    return result["metrics"]["frechet_distance"]


def spread_of(results: list[dict]) -> dict:
    """Returns the mean and the standard deviation of the distances of a point with several seeds."""
    distances = [distance(result) for result in results]
    return {
        **results[0]["point"],
        "seeds": [result["point"]["seed"] for result in results],
        "distances": distances,
        "mean": statistics.mean(distances),
        "standard_deviation": statistics.stdev(distances),
    }


def evaluations(pipeline: SamplingPipeline, call: dict) -> tuple[int, int]:
    """Returns the number of evaluations of UNets and of classifiers per image."""
    if "guidance_fn" in call:
        call = {**call, "guidance_fn": run_options(pipeline, call).guidance_fn}
    with counted((ADMUNet2DModel, NoisyClassifier)) as counts:
        pipeline([0], generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    return counts[ADMUNet2DModel], counts[NoisyClassifier]


@contextmanager
def counted(classes: tuple[type, ...]) -> Iterator[dict[type, int]]:
    """Counts the images that networks of some classes are given, copies of a network included."""
    counts = dict.fromkeys(classes, 0)

    def count(module: torch.nn.Module, args: tuple) -> None:
        for cls in classes:
            if isinstance(module, cls):
                counts[cls] += len(args[0])

    hook = register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def add_bench_options(parser: CommandParser, options: type) -> None:
    """
    Adds the options of a benchmark.

    Args:
        parser: Parser to add to.
        options: Dataclass of the options of the samples.
    """
    parser.add_argument(
        "reference",
        type=text_as(),
        metavar="REFERENCE",
        help="Reference batch (.npz), or images, as for `diffusers-adm evaluate`. Required.",
    )
    add_options(parser, options, title="samples")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET, title="images")


def bench_arguments(parser: CommandParser, options: type) -> tuple:
    """
    Reads the command line of a benchmark.

    Args:
        parser: Parser with the options of `add_bench_options`.
        options: Dataclass of the options of the samples.

    Returns:
        Options of the samples, and the arguments of [`Points`].

    Raises:
        ValueError: If the pipeline has no classifier, or the feature extractor is none, or the reference does not fit.
    """
    args = parser.parse_args()
    images, features, samples, model, run = (
        build_options(cls, args) for cls in (ImageSetOptions, FeatureOptions, options, ModelOptions, RunOptions)
    )
    images.check(args.reference)
    check_extractor(args.reference, features.feature_extractor)
    state = join_processes()
    pipeline = load_pipeline(**option_values(model), device=state.device)
    if pipeline.classifier is None:
        raise ValueError(f"The benchmark requires a pipeline with a classifier, but {model.model} has none.")
    evaluator = None
    if state.is_main_process:
        evaluator = build_evaluator(args.reference, images, features, image_shape(pipeline), judged=True)
    settings = Settings(
        num_images=samples.num_samples,
        model_name=model.model,
        **option_values(run),
    )
    return samples, (pipeline, evaluator, samples.output, settings)
